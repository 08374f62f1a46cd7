"""Adapters in the format of Hugging Face PEFT, read and written without it.

`config.py` says what an `adapter_config.json` may hold, `matching.py` which modules it means, `rules.py` says the same
as a rule file; `keys.py` is the correspondence of names. `load.py` is the way in, `export.py` the way out. Facts are of
PEFT 0.21.
"""
