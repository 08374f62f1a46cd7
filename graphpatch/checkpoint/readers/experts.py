"""What a single expert is called in the files of its model, which is what most readers go by.

Transformers 5 keeps the experts of a layer in stacks, `mlp.experts.gate_up_proj` (experts, 2 x intermediate, hidden).
The files hold one by one, `mlp.experts.3.gate_proj`, or by older names, `block_sparse_moe.experts.3.w1`
(transformers 5.24, `conversion_mapping.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from ...tree.tree import Tree

Role = Literal["gate", "up", "down"]
ROLES: Mapping[str, Role] = {
    "gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down",
}  # fmt: skip
"""What an expert's projection does, by any of its names."""
_EXPERT = re.compile(r"(?P<block>.*)\.experts\.(?P<number>\d+)\.(?P<name>\w+)")


class Names(NamedTuple):
    """What a family of models calls its experts."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    module: str = ""
    """The block that holds them in the model, where the files have another name for it."""
    file: str = ""

    def of(self, role: Role) -> str:
        return {"gate": self.gate, "up": self.up, "down": self.down}[role]

    def path(self, owner: str, number: int, role: Role) -> str:
        """The path in the files: of `model.layers.0.mlp.experts`, `model.layers.0.block_sparse_moe.experts.3.w1`."""
        block, dot, experts = owner.rpartition(".")
        if self.module and block.endswith(f".{self.module}"):
            block = block.removesuffix(self.module) + self.file
        return f"{block}{dot}{experts}.{number}.{self.of(role)}"


_W = Names("w1", "w3", "w2")
_MIXTRAL = _W._replace(module="mlp", file="block_sparse_moe")
FAMILIES: Mapping[str, Names] = {
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2", "minimax_m3_vl", "phimoe", "kimi_linear"), _MIXTRAL),
    "lfm2_moe": _W,
    "deepseek_v4": _W._replace(module="mlp", file="ffn"),
}
"""By `model_type`; all others with experts one by one have the ordinary names."""


class Expert(NamedTuple):
    """One projection of one expert, as a path names it."""

    block: str
    number: int
    name: str

    @property
    def role(self) -> Role | None:
        return ROLES.get(self.name)


def names_of(tree: Tree) -> Names:
    """By the nearest config that says what the model is."""
    kinds = [str(config.get("model_type", "")) for config in tree.configs]
    return next((FAMILIES[kind] for kind in kinds if kind in FAMILIES), Names())


def expert(path: str) -> Expert | None:
    """What a path says of one expert, else None."""
    found = _EXPERT.fullmatch(path)
    return Expert(found["block"], int(found["number"][:9]), found["name"]) if found else None


def stack_of(tree: Tree, one: Expert) -> int | None:
    """The node that holds the stack of an expert, whichever name its block has."""
    names = names_of(tree)
    blocks = [one.block]
    if names.file and one.block.endswith(f".{names.file}"):
        blocks.append(one.block.removesuffix(names.file) + names.module)
    found = [node for block in blocks if (node := tree.find(f"{block}.experts")) is not None]
    return next((node for node in found if stacks(tree, node)), None)


def stacks(tree: Tree, node: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters of three dimensions that a module holds: (experts, ., .)."""
    return {n: tuple(t.shape) for n, t in tree.signature(node).parameters.items() if len(t.shape) == 3}
