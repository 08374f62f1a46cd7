"""What the rules froze stays frozen where the model is sharded afterwards.

`parallelize_module` of PyTorch 2.6 makes every parameter anew, and lets each require a gradient.
"""

from __future__ import annotations

import logging

from torch import nn

from .checks import is_sharded

_FROZEN = "_graphpatch_frozen"
"""In the `__dict__` of a module that was transformed and may be sharded next: its parameters that do not train."""
_log = logging.getLogger("graphpatch")


def remember_frozen(model: nn.Module) -> None:
    """Note, by name, what does not train of a model that was just transformed."""
    parameters = model.named_parameters(remove_duplicate=False)
    model.__dict__[_FROZEN] = frozenset(name for name, p in parameters if not p.requires_grad)


def freeze_again(module: nn.Module) -> None:
    """Freeze what of that has become a sharded parameter, and trains. Once: who lets it train later means it."""
    for part in module.modules():
        names = part.__dict__.pop(_FROZEN, ())
        parameters = part.named_parameters(remove_duplicate=False) if names else ()
        again = [p for name, p in parameters if name in names and p.requires_grad and is_sharded(p)]
        for parameter in again:
            parameter.requires_grad = False
        if again:
            _log.info("sharding let %d parameters train that the rules froze; they are frozen again", len(again))
