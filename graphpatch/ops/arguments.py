"""From the values a rule gives to an op with typed arguments, and from pydantic's findings to sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import Field, ValidationError

from .op import Op
from .registry import find, names

Count = Annotated[int, Field(strict=True, ge=1)]
"""A whole number, at least one; `true` is none."""
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
"""A finite number; `true` is none."""
Share = Annotated[float, Field(strict=True, ge=0, lt=1)]
"""A probability below one."""
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True, min_length=1)]

_ELSEWHERE = {
    "r": "rank",
    "dim": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_dtype": "dtype",
    "init_lora_weights": "init",
    "lora_A_init_method": "init",
    "rslora": "use_rslora",
    "name": "adapter",
    "adapter_name": "adapter",
    "class_": "class",
    "cls": "class",
    "scale": "by",
    "factor": "by",
}
"""What PEFT, NeMo and habit call an argument -> what ours is called; used where the op has the latter."""


class UnknownOp(Exception):
    """No op has that name: `name`, and the nearest in `suggestions`."""

    def __init__(self, name: str, suggestions: Sequence[str], why: str = ""):
        super().__init__(why or f"no op is called `{name}`")
        self.name, self.suggestions = name, list(suggestions)


class ArgumentError(Exception):
    """An argument does not fit.

    `argument` is its name, or its position (0-based) where it was given without one, or None where one is missing.
    `unknown` tells a name that the op does not have from a value that it does not take. `message` is a sentence,
    `suggestions` are the names or values that were probably meant, `hint` says what to do in words.
    """

    def __init__(
        self,
        argument: str | int | None,
        message: str,
        suggestions: Sequence[str] = (),
        hint: str = "",
        unknown: bool = False,
    ):
        super().__init__(message)
        self.argument, self.message, self.suggestions = argument, message, list(suggestions)
        self.hint, self.unknown = hint, unknown


def arguments(cls: type[Op]) -> list[str]:
    """The names of an op's arguments as a rule writes them, in the order in which positional ones fill them; those that
    are `kw_only`, which mostly are found out and seldom given, come last."""
    fields = sorted(cls.model_fields.items(), key=lambda item: bool(item[1].kw_only))
    return [field.alias or name for name, field in fields]


def build(name: str, positional: Sequence[Any], named: Mapping[str, Any]) -> Op:
    """The op `name` with these arguments.

    Raises `UnknownOp`, or `ArgumentError` for the first argument that does not fit.
    """
    try:
        cls = find(name)
    except Exception as error:  # an installed plugin may fail to import in any way it likes
        raise UnknownOp(name, [], f"the op `{name}` could not be loaded: {_first_line(error)}") from error
    if cls is None:
        raise UnknownOp(name, get_close_matches(name, names(), n=1))
    known = arguments(cls)
    closed = cls.model_config.get("extra") != "allow"
    if len(positional) > len(known):
        takes = f"at most {len(known)}" if known else "no"
        raise ArgumentError(
            len(known), f"`{name}` takes {takes} unnamed argument{'s' * (len(known) != 1)}", hint=_all(known)
        )
    values = dict(zip(known, positional))
    for argument, value in named.items():
        if argument in values:
            raise ArgumentError(argument, f"`{argument}` of `{name}` is given twice")
        if closed and argument not in known:
            meant = (
                [_ELSEWHERE[argument]] if _ELSEWHERE.get(argument) in known else get_close_matches(argument, known, n=1)
            )
            raise ArgumentError(argument, f"`{name}` has no argument `{argument}`", meant, _all(known), unknown=True)
        values[argument] = value
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise _translate(name, known, len(positional), error) from None


def _translate(op: str, known: list[str], positional: int, error: ValidationError) -> ArgumentError:
    found = error.errors(include_url=False)[0]
    kind, context, value = found["type"], found.get("ctx", {}), found["input"]
    if not found["loc"]:
        message = str(context.get("error", found["msg"]))
        return ArgumentError(None, f"`{op}`: {message}")
    argument = str(found["loc"][0])
    where: str | int = argument
    if argument in known and known.index(argument) < positional:
        where = known.index(argument)
    if kind == "missing":
        return ArgumentError(None, f"`{op}` needs `{argument}`", hint=f"write {op}({argument}=...)")
    shown = _shown(value)
    sentence = {
        "int_type": "must be a whole number",
        "float_type": "must be a number",
        "bool_type": "must be true or false",
        "string_type": "must be text in quotes",
        "finite_number": "must be finite",
        "string_too_short": "must not be empty",
    }.get(kind)
    if kind in _BOUNDS:
        bound = next(iter(context.values()))
        sentence = f"must be {_BOUNDS[kind]} {bound:g}"
    elif kind == "literal_error":
        return _choice(op, where, argument, context["expected"], value)
    elif kind == "value_error":
        sentence = str(context["error"])
    return ArgumentError(where, f"`{argument}` of `{op}` {sentence or found['msg'].lower()}, not {shown}")


_BOUNDS = {
    "greater_than": "greater than",
    "greater_than_equal": "at least",
    "less_than": "less than",
    "less_than_equal": "at most",
}


def _choice(op: str, where: str | int, argument: str, expected: str, value: Any) -> ArgumentError:
    choices = [c.strip("'") for c in expected.replace(" or ", ", ").split(", ")]
    meant = get_close_matches(value, choices, n=1) if isinstance(value, str) else []
    listed = ", ".join(f'"{c}"' for c in choices)
    return ArgumentError(where, f"`{argument}` of `{op}` must be one of {listed}, not {_shown(value)}", meant)


def _all(known: list[str]) -> str:
    return f"Arguments: {', '.join(known)}" if known else ""


def _shown(value: Any) -> str:
    from .op import _written

    text = _written(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n", 1)[0][:200]
