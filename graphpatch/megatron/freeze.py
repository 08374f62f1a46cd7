"""Which parameters train, decided on the whole of a model that stands on several ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ..patch.grads import set_flags, set_single_flags
from ..patch.patch import Patch
from ..plan.freeze import Grads
from ..plan.plan import Plan
from ..plan.refreeze import decided
from ..tree.tree import Tensor, Tree
from .ranks import told
from .whole import expert_rank, merged, numbered


def part_of_grads(grads: Grads, here: Mapping[int, int], there: Mapping[int, int]) -> Grads:
    """What is said of the modules of a part: `here` are its nodes by those of the whole, `there` the other way."""
    nodes = [there[at] for at in range(len(there))]
    return Grads(
        bytearray(grads.own[node] for node in nodes),
        bytearray(grads.added[node] for node in nodes),
        {(here[node], name): state for (node, name), state in grads.each.items() if node in here},
    )


def freeze_anew(whole: Plan, chunks: Sequence[nn.Module], patches: Sequence[Patch]) -> None:
    """The freeze and train rules once more, where modules were added or took a place: on the patched model, all of it,
    since a rule may speak of any layer. Called on every rank."""
    brings = any(step.op.exclusive or any("." in name for name in step.adds) for step in whole.steps)
    if whole.grads is None or not brings:
        return
    trees = [numbered(Tree.of(chunk, as_patched=True), expert_rank()) for chunk in chunks]
    # The path of each new parameter's module in the whole model, and its name.
    new = {key.rpartition(".")[::2] for patch in patches for key in patch.adapter_state_dict()}
    said = told(([tree.to_text() for tree in trees], sorted(new)))
    now = merged([Tree.from_text(text) for text in dict.fromkeys(t for texts, _ in said for t in texts)])
    added: dict[int, dict[str, Tensor]] = {}
    for path, name in sorted({tuple(one) for _, names in said for one in names}):
        node = now.find(path)
        assert node is not None
        added.setdefault(node, {})[name] = now.signature(node).parameters[name]
    grads = decided(whole, now, added).grads
    for tree, patch in zip(trees, patches):
        here = {node: at for node, path in enumerate(now.paths) if (at := tree.find(path)) is not None}
        there = {at: node for node, at in here.items()}
        own = part_of_grads(grads, here, there)
        mine = {here[node]: names for node, names in added.items() if node in here}
        set_flags(tree, own, patch._journal.flags, mine)
        set_single_flags(tree, own, patch._journal.flags)
