"""What an adapter adds to each matrix of its base: one product of two factors, B A, with the scale already in B.

Whatever kind of LoRA it was (rsLoRA, patterns of ranks, an init that changed the base, parts of a fused projection), an
update of low rank can be said so. What is no such product is refused, naming the readers that could not use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from ...lang.diagnostics import Diagnostic, Error
from ...ops.lora_experts import stacks_of
from ...ops.lora_shapes import factor_shapes
from ...ops.op import Refusal
from ...patch.imports import load_rewrite
from ...plan.plan import Plan, Step
from ...rewrites.merging import LowRank, Product, Unmergeable
from ...rewrites.rewrite import InPlace
from ...tree.tree import Signature, Tree
from .table import TABLE


class Delta(NamedTuple):
    """What one module gains."""

    path: str
    a: Tensor
    """(rank, in); of a convolution (rank, in, *kernel); of an embedding (rank, vocabulary); of a stack of experts
    (experts, rank, in)."""
    b: Tensor
    """(out, rank); of a convolution (out, rank, 1, ...); of an embedding (dim, rank); of a stack of experts
    (experts, out, rank)."""
    embedding: bool = False
    parameter: str | None = None
    """Of a stack of experts: its name in the module at `path`."""

    @property
    def rank(self) -> int:
        return self.a.shape[1 if self.parameter else 0]


_CONV1D = "transformers.pytorch_utils.Conv1D"
_EMBEDDING = "torch.nn.modules.sparse.Embedding"
_PASSED_OVER = "quantize."
"""Ops that change how the base is kept, which a server decides for itself."""


def deltas_of(plan: Plan, tensors: Mapping[str, Tensor], moved: Sequence[str] = ()) -> list[Delta]:
    """Of an adapter whose plan and tensors these are; `moved` names base weights that trained with it.

    Raises `Error` (GP635) where something of it is no product of two factors, with all that is in the way.
    """
    found: dict[tuple[str, str | None], Delta] = {}
    wrong = [f"{key} trained as a whole; {refusers('modules_to_save', 'key')} such weights" for key in moved]
    for step in plan.steps:
        if step.op.op.startswith(_PASSED_OVER):
            continue
        if step.op.shares:
            path = plan.tree.paths[step.nodes[0]]
            wrong.append(f"{step.op.text()} on {path}: one adapter for both uses of a tied weight, which readers part")
            continue
        try:
            for delta in _of_step(plan.tree, step, tensors):
                key = delta.path, delta.parameter
                found[key] = _sum(found[key], delta) if key in found else delta
        except (Unmergeable, Refusal) as error:
            wrong.append(f"{step.op.text()} on {plan.tree.paths[step.nodes[0]] or '^'}: {error}")
    if wrong or not found:
        refuse(wrong or ["it changes no matrix of the base by factors"])
    order = {path: at for at, path in enumerate(plan.tree.paths)}
    return sorted(found.values(), key=lambda delta: order[delta.path])


def refusers(*rows: str) -> str:
    """`vllm and sglang refuse`: those whose rows of these names stand against it."""
    names = list(dict.fromkeys(row.reader for row in TABLE if row.name in rows))
    return f"{', '.join(names[:-1])} and {names[-1]} refuse or drop" if len(names) > 1 else f"{names[0]} refuses"


def refuse(wrong: Iterable[str]) -> NoReturn:
    """Raise `Error` (GP635)."""
    lines = list(dict.fromkeys(wrong))
    raise Error(
        Diagnostic(
            "GP635",
            "this adapter cannot be written in the form that every reader understands alike",
            text=(*lines[:8], *([f"and {len(lines) - 8} more"] if len(lines) > 8 else [])),
            fixes=(
                'profile "peft" says it as PEFT does, which reads more than servers do',
                "or merge it into the base, and serve that: graphpatch merge",
            ),
        )
    )


def _sum(one: Delta, other: Delta) -> Delta:
    """Two updates of one module, side by side."""
    along_a, along_b = (1, 2) if one.parameter else (0, 1)
    return one._replace(a=torch.cat([one.a, other.a], along_a), b=torch.cat([one.b, other.b], along_b))


def _of_step(tree: Tree, step: Step, tensors: Mapping[str, Tensor]) -> Iterable[Delta]:
    mixin = load_rewrite(step.rewrite, step.rule)
    if not (isinstance(mixin, type) and issubclass(mixin, InPlace)):
        raise Unmergeable("it puts another module there, which no reader builds")
    entry = mixin.entry(step.op, step.parameter)
    for node in step.nodes:
        path, signature = tree.paths[node], tree.signature(node)
        if not path:
            raise Unmergeable("it is on the model itself, which has no name that a key could begin with")
        own = {name: tensors[f"{path}.{name}"] for name in step.adds}
        shapes = {name: tuple(tensor.shape) for name, tensor in signature.parameters.items()}
        for name, merging in mixin.merging(entry, own, shapes).items():
            if name == "bias":
                raise Unmergeable(f"its bias trained; {refusers('bias')} biases")
            if not isinstance(merging, LowRank):
                raise Unmergeable(f"DoRA is no product of two factors; {refusers('dora')} it")
            if len(shapes.get(name, ())) == 3 and name != "weight":
                yield _of_stack(path, name, shapes[name], signature, merging)
            elif name == "weight":
                yield _of_weight(path, signature, merging)
            else:
                raise Unmergeable(f"no reader but PEFT knows factors of `{name}`")


def _of_weight(path: str, signature: Signature, merging: LowRank) -> Delta:
    kinds = set(signature.mro)
    if any("ConvTranspose" in kind for kind in kinds):
        raise Unmergeable("no reader but PEFT knows factors of a transposed convolution")
    _refuse_convolution(signature)
    (_, *in_), (out, *_) = factor_shapes(signature, 1)
    if _CONV1D in kinds or _EMBEDDING in kinds:  # stored (in, out)
        left, right = _whole(merging, in_[0], out)
        return Delta(path, left.t(), scaled(right.t(), merging.scale), _EMBEDDING in kinds)
    left, right = _whole(merging, out, merging.columns)
    b = scaled(left, merging.scale)
    return Delta(path, right.reshape(-1, *in_), b.reshape(*b.shape, *(1 for _ in in_[1:])))


def _refuse_convolution(signature: Signature) -> None:
    """PEFT's A is a convolution with stride and padding alone."""
    facts = signature.attributes
    if facts.get("groups", 1) != 1:
        raise Unmergeable("a convolution with groups has other factors here than PEFT's")
    dilation = facts.get("dilation", 1)
    if any(step != 1 for step in (dilation if isinstance(dilation, tuple) else (dilation,))):
        raise Unmergeable("PEFT's A is a convolution without dilation, and this one has some")
    if facts.get("padding_mode", "zeros") != "zeros":
        raise Unmergeable(f"PEFT's A pads with zeros, and this pads with {facts['padding_mode']!r}")


def _of_stack(path: str, name: str, shape: Sequence[int], signature: Signature, merging: LowRank) -> Delta:
    experts, rows, columns = shape
    held: list[list[Product]] = [[] for _ in range(experts)]
    for product in merging.products:
        at, row = divmod(product.row, rows)
        held[at].append(product._replace(row=row))
    pairs = [_whole(LowRank(products, 1.0, columns), rows, columns) for products in held]
    left, right = torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])
    if stacks_of(signature)[1]:  # stored (experts, in, out)
        left, right = right.mT, left.mT
    return Delta(path, right, scaled(left, merging.scale), parameter=name)


def _whole(merging: LowRank, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """All products of a parameter as one, left (rows, rank) and right (rank, columns)."""
    products = merging.products
    first = products[0]
    if len(products) == 1 and first.left.shape[0] == rows and first.right.shape[1] == columns:
        return first.left, first.right
    rank = sum(product.left.shape[1] for product in products)
    left, right = first.left.new_zeros(rows, rank), first.right.new_zeros(rank, columns)
    at = 0
    for a_left, a_right, row, column in products:
        end = at + a_left.shape[1]
        left[row : row + len(a_left), at:end] = a_left
        right[at:end, column : column + a_right.shape[1]] = a_right
        at = end
    return left, right


def scaled(b: Tensor, scale: float) -> Tensor:
    """s B, in the dtype of B where that holds it exactly, else in float32."""
    if scale == 1.0:
        return b
    exact = b.double() * scale
    kept = exact.to(b.dtype)
    return kept if b.dtype in (torch.float32, torch.float64) or torch.equal(kept.double(), exact) else exact.float()
