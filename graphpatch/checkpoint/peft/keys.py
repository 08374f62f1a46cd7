"""The correspondence of names: a tensor of ours, and the key that it has in PEFT's file.

    model.layers.0.self_attn.q_proj.lora_A     base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
    model.embed_tokens.lora_B                  base_model.model.model.embed_tokens.lora_embedding_B
    mlp.experts.gate_up_proj_lora_A            base_model.model.mlp.experts.base_layer.lora_A.weight
    mlp.experts.down_proj_lora_A               base_model.model.mlp.experts.lora_A.weight

PEFT wraps each parameter of a module once more, in the order in which they are registered, so that all but the last
have as many `base_layer` in their keys as there are parameters behind them. An adapter's own name stands in no key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ...ops.lora import Lora
from ...plan.plan import Plan, Step
from ...tree.tree import Signature, Tree

PREFIX = "base_model.model."

_WEIGHTS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_B_bias": "lora_B.bias",
    "lora_magnitude": "lora_magnitude_vector",
}
TAILS: Mapping[str, Mapping[str, str]] = {
    "linear": _WEIGHTS,
    "convolution": _WEIGHTS,
    "experts": _WEIGHTS,
    "embedding": _WEIGHTS | {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"},
    "transposed": {},
    "attention": {
        "in_proj_lora_A": "lora_A.weight",
        "in_proj_lora_B": "lora_B.weight",
        "out_proj_lora_A": "base_layer.out_proj.lora_A.weight",
        "out_proj_lora_B": "base_layer.out_proj.lora_B.weight",
    },
}
"""By kind of target, from the name of what an adapter adds to what PEFT calls it, below its module. Where there is
nothing, PEFT has no LoRA of that kind."""

_KINDS = {
    "torch.nn.modules.sparse.Embedding": "embedding",
    "torch.nn.modules.conv.Conv1d": "convolution",
    "torch.nn.modules.conv.Conv2d": "convolution",
    "torch.nn.modules.conv.Conv3d": "convolution",
    "torch.nn.modules.conv._ConvTransposeNd": "transposed",
    "torch.nn.modules.activation.MultiheadAttention": "attention",
}
"""By qualified class name; all else is a linear."""


@dataclass(frozen=True)
class Adapted:
    """A module with an adapter (or a parameter of it), as it stands in a plan."""

    path: str
    """Of the module."""
    parameter: str | None
    op: Lora
    kind: str
    """A key of `TAILS`."""
    depth: int
    """How many `base_layer` PEFT puts into its keys."""
    names: Mapping[str, str]
    """From what the op adds (`lora_A`) to the name of that tensor in the model."""
    shapes: Mapping[str, tuple[int, ...]]
    """By the same."""
    signature: Signature
    turned: bool = False
    """A linear whose tied weight has one adapter with an embedding: its factors are kept as an embedding's are."""

    @property
    def name(self) -> str:
        """What PEFT's patterns are held against."""
        return self.path if self.parameter is None else f"{self.path}.{self.parameter}"

    def key(self, added: str) -> str:
        """The key in PEFT's file of what the op adds under the name `lora_A`, say."""
        return peft_key(self.path + ".base_layer" * self.depth, TAILS[self.kind][added])


def peft_key(path: str, tail: str) -> str:
    return f"{PREFIX}{path}.{tail}" if path else PREFIX + tail


def adapted(plan: Plan) -> list[Adapted]:
    """All that a plan gives an adapter, in the order of the model."""
    steps = [step for step in plan.steps if isinstance(step.op, Lora)]
    nested = _nested(plan.tree, steps)
    found = [(node, one) for step in steps for node, one in _of_step(plan.tree, step, nested)]
    return [one for _, one in sorted(found, key=lambda pair: (pair[0], -pair[1].depth))]


def _of_step(tree: Tree, step: Step, nested: Mapping[int, list[str]]) -> Iterator[tuple[int, Adapted]]:
    op = step.op
    assert isinstance(op, Lora)
    own = {name: added_name(name, op, step.parameter) for name in step.adds}
    shapes = {own[name]: tuple(tensor.shape) for name, tensor in step.adds.items()}
    for node in step.nodes:
        path, signature = tree.paths[node], tree.signature(node)
        dot = f"{path}." if path else ""
        kind, depth = "linear", 0
        if step.parameter is not None:
            behind = nested[node]
            kind, depth = "experts", len(behind) - 1 - behind.index(step.parameter)
        else:
            kind = next((_KINDS[cls] for cls in signature.mro if cls in _KINDS), "linear")
        names = {added: dot + name for name, added in own.items()}
        if op.tied:  # the tensors are those of the module that has the weight first
            first = tree.paths[tree.first_of.get((node, "weight"), (node, "weight"))[0]]
            names = {added: f"{first}.{key}" for added, key in zip(("lora_A", "lora_B"), op.keys)}
        yield (
            node,
            Adapted(path, step.parameter, op, kind, depth, names, shapes, signature, op.tied and kind == "linear"),
        )


def added_name(name: str, op: Lora, parameter: str | None) -> str:
    """`lora_A` for `lora_A_math` of the adapter `math`, and for `gate_up_proj_lora_A` of a parameter."""
    if op.adapter:
        name = name.removesuffix(f"_{op.adapter}")
    return name if parameter is None else name.removeprefix(f"{parameter}_")


def _nested(tree: Tree, steps: list[Step]) -> dict[int, list[str]]:
    """By node, the parameters with an adapter, in the order in which they are registered."""
    found: dict[int, set[str]] = {}
    for step in steps:
        for node in step.nodes if step.parameter is not None else ():
            found.setdefault(node, set()).add(str(step.parameter))
    return {node: [n for n in tree.signature(node).parameters if n in names] for node, names in found.items()}


# ── the way back ──

_WRAPPERS = re.compile(r"^(?:base_model\.model\.|base_model\.)?(?:(?:_orig_mod|module|_fsdp_wrapped_module)\.)*")
_NAMED = re.compile(r"\.(lora_[AB])\.[^.]+\.(weight|bias)$|\.(lora_embedding_[AB]|lora_magnitude_vector)\.[^.]+$")
_COPIES = re.compile(r"\.modules_to_save(?:\.default)?(?=\.)")


def canonical(key: str) -> str:
    """A key as PEFT 0.21 writes it, of one that an older version wrote, or a model in another wrapper.

    Wrappers go, the prefix is put there, `lora_magnitude_vector.weight` is `lora_magnitude_vector`, and the name of the
    adapter, which a plain `state_dict()` has in its keys, is taken out.
    """
    key = PREFIX + _COPIES.sub("", key[_WRAPPERS.match(key).end() :])  # type: ignore[union-attr]
    found = _NAMED.search(key)
    if found is None:
        return key
    tail = f"{found[1]}.{found[2]}" if found[1] else found[3]
    return f"{key[: found.start()]}.{tail}"


def adapter_path(key: str) -> str | None:
    """The path of the module that a canonical key gives an adapter, `base_layer` included; None for other tensors."""
    for tail in _TAIL_ENDS:
        if key.endswith(tail):
            return key.removeprefix(PREFIX)[: -len(tail)]
    return None


_TAIL_ENDS = tuple(dict.fromkeys(f".{tail}" for tails in TAILS.values() for tail in tails.values()))


def base_name(key: str) -> str:
    """The name in the model of a tensor of the base, from a canonical key: `lm_head.weight`, `q_proj.bias`."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".").removeprefix("base_layer.")
