"""What is to be known of an op, read off its pydantic model and docstrings: for `graphpatch ops` and for docs/ops."""

from __future__ import annotations

import ast
import inspect
import types
from dataclasses import dataclass
from textwrap import dedent
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from ..ops.op import Op
from ..plan.scope import show

_KINDS = {int: "whole number", float: "number", bool: "true or false", str: "text", list: "list", type(None): "none"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class Argument:
    name: str
    kind: str
    """`whole number, at least 1`"""
    default: str | None
    """As a rule would write it; None where the argument must be given."""
    about: str


@dataclass(frozen=True)
class OpFacts:
    name: str
    summary: str
    paragraphs: tuple[str, ...]
    """The docstring after its first line: what is computed, and where that comes from."""
    arguments: tuple[Argument, ...]
    open: bool
    """Any other argument is taken too."""
    accepts: tuple[tuple[str, str], ...]
    """(qualified class name, import path of the rewrite); `*` is any module."""
    traits: tuple[str, ...]
    """Sentences on what it keeps and what it does not."""

    def usage(self) -> str:
        """`lora(rank=8, alpha=none, ...)`, what must be given first."""
        said = [a.name if a.default is None else f"{a.name}={a.default}" for a in self.arguments]
        return f"{self.name}({', '.join(said + (['...'] if self.open else []))})"


def op_facts(op: type[Op]) -> OpFacts:
    summary, _, rest = inspect.cleandoc(op.__doc__ or "").partition("\n")
    abouts = _field_docs(op)
    return OpFacts(
        name=op.op,
        summary=summary.strip(),
        paragraphs=tuple(" ".join(p.split()) for p in rest.strip().split("\n\n") if p.strip()),
        arguments=tuple(_argument(name, field, abouts.get(name, "")) for name, field in op.model_fields.items()),
        open=op.model_config.get("extra") == "allow",
        accepts=tuple(op.accepts.items()),
        traits=tuple(_traits(op)),
    )


def _argument(name: str, field: FieldInfo, about: str) -> Argument:
    bounds = [f"{_BOUNDS[k]} {getattr(m, k):g}" for m in field.metadata for k in _BOUNDS if hasattr(m, k)]
    kind = ", ".join([_kind(field.annotation), *bounds])
    default = None if field.is_required() else show(field.get_default(call_default_factory=True))
    return Argument(field.alias or name, kind, default, about)


def _kind(annotation: Any) -> str:
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_kind(part) for part in get_args(annotation))
    if get_origin(annotation) is Literal:
        return " or ".join(show(value) for value in get_args(annotation))
    if hasattr(annotation, "__metadata__"):  # Annotated inside a union
        bounds = [f"{_BOUNDS[k]} {getattr(m, k):g}" for m in _flat(annotation) for k in _BOUNDS if hasattr(m, k)]
        return ", ".join([_kind(get_args(annotation)[0]), *(b for b in bounds if b)])
    return _KINDS.get(get_origin(annotation) or annotation, getattr(annotation, "__name__", str(annotation)))


def _flat(annotation: Any) -> list[Any]:
    found: list[Any] = []
    for entry in annotation.__metadata__:
        found += getattr(entry, "metadata", None) or [entry]
    # A bound that is not set is None on pydantic's own marker.
    return [m for m in found if any(getattr(m, k, None) is not None for k in _BOUNDS)]


def _field_docs(op: type[Op]) -> dict[str, str]:
    """The strings that stand below fields; Python keeps them only in the source."""
    docs: dict[str, str] = {}
    for cls in reversed(op.__mro__):
        if not issubclass(cls, Op) or cls is Op:
            continue
        try:
            body = ast.parse(dedent(inspect.getsource(cls))).body[0]
        except (OSError, TypeError, SyntaxError):  # defined in a notebook or by exec: there is no source
            continue
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:]):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                if isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
                    docs[field.target.id] = " ".join(below.value.value.split())
    return docs


def _traits(op: type[Op]) -> list[str]:
    if op.exclusive:
        return ["Takes the module's place (`-/+` in a plan): keys may move, and no other op may act there or below."]
    kept = "The module object, its name, its keys and its ties stay; a plan shows it as `~`."
    inside = f"Level {op.level}: ops of a lower level stand nearer to the original forward."
    exact = "Bit for bit the original outputs until trained." if op.exact_at_init else ""
    return [t for t in (kept, inside, exact) if t]
