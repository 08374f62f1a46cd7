"""What the rules froze stays frozen where the model is sharded afterwards.

`parallelize_module` of PyTorch 2.6 makes every parameter anew, and lets each require a gradient.
"""

from __future__ import annotations

import logging

from torch import nn

_FROZEN = "_graphpatch_frozen"
"""In the `__dict__` of a module that was transformed: the names of its parameters that do not train."""
_log = logging.getLogger("graphpatch")


def remember_frozen(model: nn.Module) -> None:
    """Note what of a model that was just transformed does not train."""
    parameters = model.named_parameters(remove_duplicate=False)
    model.__dict__[_FROZEN] = frozenset(name for name, p in parameters if not p.requires_grad)


def freeze_again(module: nn.Module) -> None:
    """Freeze what of that has become a sharded parameter, and trains."""
    for part in module.modules():
        names = part.__dict__.get(_FROZEN, ())
        again = [
            p
            for name, p in (part.named_parameters(remove_duplicate=False) if names else ())
            if name in names and p.requires_grad and type(p.data).__name__ == "DTensor"
        ]
        for parameter in again:
            parameter.requires_grad = False
        if again:
            _log.info("sharding let %d parameters train that the rules froze; they are frozen again", len(again))
