"""Where people train with Hugging Face: what a `Trainer` needs to know of a patched model."""

from __future__ import annotations

from importlib.util import find_spec

from ..lang.diagnostics import Diagnostic, Error

if find_spec("transformers") is None:
    raise Error(
        Diagnostic(
            "GP659",
            "graphpatch.transformers needs the package transformers, and it is not installed",
            fixes=("pip install 'graphpatch[transformers]'",),
        )
    )

from .callback import AdapterCheckpoint as AdapterCheckpoint
from .merged import save_merged as save_merged

__all__ = ["AdapterCheckpoint", "save_merged"]
