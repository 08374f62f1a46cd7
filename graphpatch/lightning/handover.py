"""From the process that trained to the one that started it, where no callback is ever called."""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path
from uuid import uuid4

import torch
from torch import nn

from .atomic import AtomicIO
from .contents import names_to_save


class Handover:
    """A file whose name both know, since the name was made before the processes parted.

    Under `ddp_fork` and `ddp_spawn` the model that trained is a copy. Lightning brings its state dict back, but to a
    module that was never transformed, and drops what that has no place for.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.gettempdir()) / f"graphpatch-{uuid4().hex}.pt"

    def give(self, module: nn.Module, first: bool) -> None:
        """At the end of training, by the first rank, if it was started as a process of this kind."""
        if first and multiprocessing.parent_process() is not None:
            names = names_to_save(module)
            AtomicIO().save_checkpoint({n: t.cpu() for n, t in module.state_dict().items() if n in names}, self.path)

    def take(self, module: nn.Module) -> None:
        """What was handed over, into the module that is transformed by now; once."""
        if multiprocessing.parent_process() is None and self.path.exists():
            module.load_state_dict(torch.load(self.path, map_location="cpu", weights_only=True), strict=False)
            self.path.unlink()
