"""The places of the weights of a whole model, of which this rank has some, and of some of those a part."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..checkpoint.mapped.slots import Slot, held_by, whole
from ..tree.tree import Tree
from .ranks import told
from .sharding import share_of
from .whole import expert_rank, numbered

EMBEDDING = "embedding.word_embeddings.weight"


def slots(models: Sequence[nn.Module]) -> dict[str, Slot]:
    """Of this rank's chunks, by the names in the whole model. Asks all ranks what they have."""
    found: dict[str, Slot] = {}
    for model in models:
        found |= _own(model)
    for others in told({key: slot.shape for key, slot in found.items()}):
        for key, shape in others.items():
            found.setdefault(key, Slot(None, shape, lambda value: value))
    return found


def _own(model: nn.Module) -> dict[str, Slot]:
    tree = Tree.of(model, as_patched=True)
    here = dict(zip(tree.paths, numbered(tree, expert_rank()).paths))
    owners = dict(model.named_modules())
    found: dict[str, Slot] = {}
    for key, tensor in held_by(model).items():
        path, _, name = key.rpartition(".")
        whole_key = f"{here.get(path, path)}.{name}" if path else name
        if name == "weight" and path.endswith("output_layer") and getattr(tensor, "shared_embedding", False):
            whole_key = EMBEDDING  # the last stage's copy of what the first has
        found[whole_key] = _slot(owners[path], name, tensor)
    return found


def _slot(module: nn.Module, name: str, tensor: Tensor) -> Slot:
    share = share_of(module, name)
    if share is None:
        return whole(tensor)
    if share.view != share.part:
        return Slot(tensor, share.shape, share.own)
    (cut,) = share.cuts
    return Slot(tensor, share.shape, cut.own, cut.dim)
