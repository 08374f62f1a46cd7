"""The rule language as data: what the parser makes, the formatter prints, and JSON carries.

Every node is a frozen pydantic model with a `span` into its source. Two nodes are equal when they mean the same,
wherever they were written: `span`, and any other field named `*_span` or `*_spans`, takes no part in comparison.
A notebook may build these without any text.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from .diagnostics import Span


class Node(BaseModel):
    """The base of all syntax: frozen, closed, compared without its position."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    span: Span | None = Field(default=None, repr=False)

    def __eq__(self, other: Any) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, f) == getattr(other, f) for f in type(self).model_fields if not _is_position(f))

    def __hash__(self) -> int:
        return hash((type(self), *(getattr(self, f) for f in type(self).model_fields if not _is_position(f))))


def _is_position(field: str) -> bool:
    return field == "span" or field.endswith(("_span", "_spans"))


def _position() -> Any:
    return Field(default=None, repr=False)


def _positions() -> Any:
    return Field(default=(), repr=False)


# ── Expressions ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Literal_(Node):
    """`16`, `0.05`, `"last"`, `true`, `none`."""

    kind: Literal["literal"] = "literal"
    # Exact types: 1, 1.0 and true are three values.
    value: Annotated[StrictBool | StrictInt | StrictFloat | StrictStr | None, Field(union_mode="left_to_right")]

    def __eq__(self, other: Any) -> bool:
        return (
            type(other) is Literal_ and type(other.value) is type(self.value) and repr(other.value) == repr(self.value)
        )

    def __hash__(self) -> int:
        return hash(("literal", type(self.value), repr(self.value)))


class Var(Node):
    """`$rank`: a param, or a capture of the rule's selector."""

    kind: Literal["var"] = "var"
    name: str


class Name(Node):
    """`in_features`, `config.hidden_size`: an attribute of the target, or a key of a config."""

    kind: Literal["name"] = "name"
    name: str


class ListExpr(Node):
    """`[0, 24]`."""

    kind: Literal["list"] = "list"
    items: tuple[Expr, ...]


class Unary(Node):
    """`-x`, `+x`, `not x`."""

    kind: Literal["unary"] = "unary"
    op: Literal["-", "+", "not"]
    operand: Expr


class Binary(Node):
    """`2 * $rank`: arithmetic; left-associative but for `**`."""

    kind: Literal["binary"] = "binary"
    op: Literal["+", "-", "*", "/", "//", "%", "**"]
    left: Expr
    right: Expr


class BoolOp(Node):
    """`a and b and c`; as Python's, the last operand evaluated is the value."""

    kind: Literal["bool"] = "bool"
    op: Literal["and", "or"]
    operands: tuple[Expr, ...] = Field(min_length=2)


class Comparison(Node):
    """One link of a chain: `< 8`."""

    op: Literal["<", "<=", ">", ">=", "==", "!=", "in", "not in", "is", "is not"]
    right: Expr


class Compare(Node):
    """`4 <= $i < 8`: chained, as Python's."""

    kind: Literal["compare"] = "compare"
    left: Expr
    links: tuple[Comparison, ...] = Field(min_length=1)


class IfElse(Node):
    """`x if test else y`."""

    kind: Literal["if"] = "if"
    then: Expr
    test: Expr
    otherwise: Expr


class Item(Node):
    """`config.layer_types[$i]`."""

    kind: Literal["item"] = "item"
    value: Expr
    index: Expr


class Arg(Node):
    """`rank=16`, or positional where `name` is none."""

    name: str | None = None
    value: Expr
    name_span: Span | None = _position()


class Call(Node):
    """`sqrt(x)`; in an argument also an op, `adapter.bottleneck(dim=64)`."""

    kind: Literal["call"] = "call"
    name: str
    args: tuple[Arg, ...] = ()
    name_span: Span | None = _position()


class Query(Node):
    """`has(selector)`, `count(selector)`."""

    kind: Literal["query"] = "query"
    function: Literal["has", "count"]
    selector: SelectorUnion


Expr = Annotated[
    Literal_ | Var | Name | ListExpr | Unary | Binary | BoolOp | Compare | IfElse | Item | Call | Query,
    Field(discriminator="kind"),
]


# ── Selectors ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Every(Node):
    """`[*]`."""

    kind: Literal["every"] = "every"


class At(Node):
    """`[5]`, `[-1]`, `[$n]`."""

    kind: Literal["at"] = "at"
    at: Expr


class Range(Node):
    """`[:-8]`, `[::2]`: Python's slice."""

    kind: Literal["range"] = "range"
    start: Expr | None = None
    stop: Expr | None = None
    step: Expr | None = None


IndexSpan = Annotated[Every | At | Range, Field(discriminator="kind")]


class Index(Node):
    """`[0, 5, 9:12]`, `[i in 4:]`; `[i]` alone (no spans) captures any index and is for `map`."""

    capture: str | None = None
    spans: tuple[IndexSpan, ...] = ()


class Step(Node):
    """One segment of a path, with its index.

    `kind` is `glob` (`q_proj`, `*_norm`, `{q,k,v}_proj`, `*`, `**`; a plain name is a glob without wildcards),
    `quoted` (a literal name with odd characters; `name` is the name itself) or `role` (`@qkv`; `name` without the `@`).
    `name_span` leaves the index out; `alternative_spans` holds one span for each alternative of each `{}`, in order.
    """

    kind: Literal["glob", "quoted", "role"] = "glob"
    name: str
    index: Index | None = None
    name_span: Span | None = _position()
    alternative_spans: tuple[Span, ...] = _positions()


class PathSelector(Node):
    """`^model.layers[0:8].**.q_proj:Linear`.

    No steps and `anchored`: the root. No steps and not `anchored`: by class alone (`:*RMSNorm`).
    `cls` is the text behind the colon (`Linear`, `*RMSNorm`, `{Linear,Conv1D}`, `=Linear`, `torch.nn.Linear`).
    """

    kind: Literal["path"] = "path"
    anchored: bool = False
    steps: tuple[Step, ...] = ()
    cls: str | None = None
    cls_span: Span | None = _position()
    cls_alternative_spans: tuple[Span, ...] = _positions()


class RegexSelector(Node):
    """`/model\\.layers\\.\\d+\\.mlp/`: full match on the whole FQN. `pattern` is between the slashes, `\\/` undone."""

    kind: Literal["regex"] = "regex"
    pattern: str
    cls: str | None = None
    cls_span: Span | None = _position()
    cls_alternative_spans: tuple[Span, ...] = _positions()


Selector = Annotated[PathSelector | RegexSelector, Field(discriminator="kind")]


class SelectorUnion(Node):
    """`a | b`: one or more branches."""

    branches: tuple[Selector, ...] = Field(min_length=1)


# ── Statements ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Use(Node):
    """`use roles`, `use softcap(cap=30)`, `use "./mine.rules"`; `by_path` tells a quoted path from a packaged name."""

    kind: Literal["use"] = "use"
    target: str
    by_path: bool = False
    args: tuple[Arg, ...] = ()
    target_span: Span | None = _position()


class Param(Node):
    """`param rank: int = 16`; without a default the caller must give it."""

    kind: Literal["param"] = "param"
    name: str
    type: Literal["int", "float", "bool", "str", "list"] | None = None
    default: Expr | None = None
    name_span: Span | None = _position()


class Alias(Node):
    """`alias qkv = self_attn.{q,k,v}_proj | c_attn`: a role; `|` means any of."""

    kind: Literal["alias"] = "alias"
    name: str
    selector: SelectorUnion
    name_span: Span | None = _position()


class Require(Node):
    """`require has(@embed)`."""

    kind: Literal["require"] = "require"
    test: Expr


class When(Node):
    """`when test { ... }`."""

    kind: Literal["when"] = "when"
    test: Expr
    body: tuple[ConditionalStatement, ...] = ()


class OpCall(Node):
    """`lora(rank=16)`; `softcap.output` without parentheses has no arguments."""

    name: str
    args: tuple[Arg, ...] = ()
    name_span: Span | None = _position()


class Expect(Node):
    """`expect 4 per @layers`, `expect >= 3`, `expect any`.

    `any` waives a hit altogether; else `count` is compared by `cmp` (`==` where none is written).
    """

    any: bool = False
    cmp: Literal["==", "!=", "<", "<=", ">", ">="] = "=="
    count: Expr | None = None
    per: Selector | None = None


class Patch(Node):
    """`patch SELECTOR with OP then OP where ... except ... expect ... as ... overrides ...`."""

    kind: Literal["patch"] = "patch"
    selector: SelectorUnion
    ops: tuple[OpCall, ...] = Field(min_length=1)
    where: Expr | None = None
    except_: SelectorUnion | None = None
    expect: Expect | None = None
    label: str | None = None
    overrides: tuple[str, ...] = ()
    label_span: Span | None = _position()
    overrides_spans: tuple[Span, ...] = _positions()


class Freeze(Node):
    """`freeze ** except @new`, `train bias as biases`: `trainable` tells them apart, `label` is an optimizer group."""

    kind: Literal["freeze"] = "freeze"
    trainable: bool = False
    selector: SelectorUnion
    where: Expr | None = None
    except_: SelectorUnion | None = None
    expect: Expect | None = None
    label: str | None = None
    label_span: Span | None = _position()


class KeyStep(Node):
    """One segment of a checkpoint key: on the left a glob with an index, on the right a name with an expression."""

    name: str
    quoted: bool = False
    index: Index | None = None
    at: Expr | None = None
    name_span: Span | None = _position()
    alternative_spans: tuple[Span, ...] = _positions()


class Map(Node):
    """`map KEYS -> KEYS using OP`; `target` none leaves the key behind."""

    kind: Literal["map"] = "map"
    source: tuple[KeyStep, ...]
    target: tuple[KeyStep, ...] | None = None
    using: OpCall | None = None


ConditionalStatement = Annotated[Patch | Freeze | Map | Require | When, Field(discriminator="kind")]
Statement = Annotated[Use | Param | Alias | Require | When | Patch | Freeze | Map, Field(discriminator="kind")]


class RuleFile(Node):
    """A whole file."""

    statements: tuple[Statement, ...] = ()


KEYWORDS = frozenset(
    "use param alias require when patch freeze train map with then where except expect any per as overrides using "
    "and or not in is if else true false none has count".split()
)
"""Words that cannot name a param, an alias or a label."""
