"""What an op is: arguments, the classes it accepts, the slot it takes, what it adds. No torch here.

How it is done stands in the file of the same name in `graphpatch/rewrites`, found through `Op.accepts`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from ..tree.tree import Signature, Tensor


class Target(NamedTuple):
    """What an op may know of the module (or parameter) it is asked to change, before anything changes."""

    path: str
    signature: Signature
    parameter: str | None = None
    """The parameter's name where the target is a parameter and not a module."""
    parent: Signature | None = None
    """The signature of the module above, for ops that must know who calls the target."""
    tied: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    """Its parameters that are another module's too: by name, the paths they have there."""
    later: frozenset[str] = frozenset()
    """Those of `tied` that another module has before this one, in the order of the tree."""
    config: Mapping[str, Any] | None = None
    """That of the nearest enclosing module that has one."""
    dtype: str = "float32"
    """Of the first floating-point parameter at or below it, else of the model's."""

    carrier: Signature | None = None
    """Of the module above that carries the change, where the op names one (`Op.seat`)."""
    path_in_seat: str | None = None
    """The target's path in that; None where the target carries it itself."""

    @property
    def seat(self) -> Signature:
        """The signature of the module that carries the change."""
        return self.carrier or self.signature

    @property
    def tensor(self) -> Tensor | None:
        return self.signature.parameters.get(self.parameter) if self.parameter else None


class Refusal(Exception):
    """An op refuses a target: `str()` says why, in a sentence; `fixes` says what to do."""

    def __init__(self, why: str, *fixes: str, code: str = "GP410"):
        super().__init__(why)
        self.fixes, self.code = fixes, code


class Op(BaseModel):
    """An op with its arguments. Subclass it, name it with `@register("mine")`, and a rule can say `with mine(...)`.

    Positional arguments of a rule fill the fields in the order of their definition. The class docstring is the op's
    docs page: what it computes, with the formula and its source.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, defer_build=True)

    op: ClassVar[str]
    """The registered name."""
    accepts: ClassVar[Mapping[str, str]] = {}
    """The visible table: qualified class name (`torch.nn.modules.linear.Linear`) -> import path of the rewrite
    (`graphpatch.rewrites.lora:LoraLinear`), resolved only when applying. The first class of a target's MRO that
    stands here decides. `*` accepts every module. A third party adds a class by adding a row: `accept(op, cls,
    rewrite)`."""
    accepts_parameters: ClassVar[Mapping[str, str]] = {}
    """The same for targets that are parameters, `mlp.experts.gate_up_proj`: from the class of the module that owns one
    to the rewrite of that module."""
    level: ClassVar[int] = 0
    """Where it wraps: lower is nearer to the original forward. LoRA 10, output scale 50, post-norm 60, softcap 70."""
    symbol: ClassVar[Literal["~", "+", "-/+"]] = "~"
    exclusive: ClassVar[bool] = False
    """True for ops that replace, wrap or drop the module: no other op may touch the node or anything below it."""
    idles: ClassVar[bool] = False
    """True where the target is not called any more, so that another op on it would do nothing."""
    acts_on_output: ClassVar[bool] = False
    """True where all it does is to change what any module (`*`) puts out: `insert_after` and `insert_before` take it as
    an argument."""
    at_end: ClassVar[bool] = False
    """Of ops on the root: True where, of a model that stands on several pipeline stages, the last alone carries it."""
    exact_at_init: ClassVar[bool] = False
    """True where the patched model computes bit for bit what the original did until it is trained."""
    merges: ClassVar[bool] = False

    def slots(self) -> frozenset[str]:
        """What it occupies on its target: two ops that share a slot collide, others compose by level."""
        return frozenset({self.op})

    def resolved(self, target: Target) -> Op:
        """The same op, with what it leaves to be found out from the target written out; `Refusal` where it cannot."""
        return self

    @property
    def depth(self) -> tuple[int, ...]:
        """Its level, and what tells it from others of that level: in a chain `A then B` that of A is not above B's."""
        return (self.level,)

    @property
    def shares(self) -> tuple[str, ...]:
        """The names of parameters that a target registers and does not add: those of the module that has its weight
        first, the same objects."""
        return ()

    def through(self, target: Target, row: str) -> str:
        """The import path of the rewrite for this target; `row` is what the table says for its class."""
        return row

    def seat(self, above: Sequence[Signature]) -> int:
        """Which module carries the change, of those from the root to the target: the target, unless said otherwise. A
        head is named by the output layer, say, and stands on the model; `adds` and the rewrite are the model's."""
        return len(above) - 1

    def repeats(self, other: Op, target: Target) -> bool:
        """Whether `other`, on the same seat for another target, does all of it for this one too."""
        return False

    def check(self, target: Target) -> None:
        """Raise `Refusal` where these arguments cannot have their full effect on this target."""

    def adds(self, target: Target) -> dict[str, Tensor]:
        """The parameters it adds to the target, by name, as a function of the target's facts; those of a module that it
        adds below the target by dotted names, `post_norm.weight`."""
        return {}

    def represents(self, target: Target) -> Mapping[str, int]:
        """The parameters of the target that are kept in another way from then on, and so cannot train, by name, with
        the bytes that each takes."""
        return {}

    def drops(self, target: Target) -> tuple[str, ...]:
        """The parameters of the target that are there no more, by name."""
        return ()

    def named(self, adapter: str | None) -> Op:
        """The same op under the adapter name given to `apply`; only adapter ops care."""
        return self

    def after(self, target: Target) -> str:
        """What the target's class is called afterwards, for the plan: `LoRA Linear`."""
        return target.signature.cls

    def text(self) -> str:
        """The op as a rule would write it, defaults left out: `lora(rank=16, alpha=32)`."""
        given = self.model_dump(by_alias=True, exclude_defaults=True)
        return f"{self.op}({', '.join(f'{name}={_written(value)}' for name, value in given.items())})"

    def arguments(self) -> dict[str, Any]:
        """The arguments as JSON values."""
        return self.model_dump(mode="json", by_alias=True)


def _written(value: Any) -> str:
    """A value as the rule language writes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_written(v) for v in value)}]"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))  # an int widens to a float, so this reads back as what it was
    return repr(value)
