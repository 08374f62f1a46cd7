"""An adapter merged into a checkpoint on disk, tensor by tensor, without the model.

`updates.py` says what the adapter makes of which weights, `pieces.py` where these lie in the files, `converted.py` the
same where files and models of transformers have other names, `write.py` writes the new files, `folder.py` keeps what
is half done out of sight. `merge.py` is the way through them. `read.py` reads weights of the base back, for unmerging.
"""
