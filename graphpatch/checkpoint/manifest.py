"""What `adapter.json` says, read and written. Nothing in it is trusted: the rules are read as any rules are."""

from __future__ import annotations

import json
from os import PathLike, fspath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..lang.diagnostics import Diagnostic, Error
from ..plan.ruleset import RuleSet
from ..tree.tree import Tree

FORMAT = 1
"""Raised when a reader of the old one would misread the new one; what is merely added is passed over."""

_STRICT = ConfigDict(strict=True, extra="ignore", frozen=True)
_HASH = Field(pattern="^[0-9a-f]{64}$")


class Change(BaseModel):
    """One op, with its arguments, on all the nodes that gained the same: what the rules must still mean."""

    model_config = _STRICT

    rule: str
    op: str
    arguments: dict[str, Any]
    paths: list[str]
    """Compressed; each reads as a selector."""
    count: int
    adds: dict[str, list[int]]
    """The parameters that each node gained, and their shapes."""

    def still(self, now: Change) -> bool:
        """Whether `now` says the same of its nodes. Arguments that the op has got since are passed over, since its
        rules cannot use them."""
        same = (self.op, list(self.adds.items())) == (now.op, list(now.adds.items()))
        return same and all(name in now.arguments and now.arguments[name] == v for name, v in self.arguments.items())


class Base(BaseModel):
    """The model that the adapter was made on."""

    model_config = _STRICT

    model: str
    """The class of its root."""
    fingerprint: str = _HASH
    """`Tree.fingerprint`."""
    weights: str = _HASH
    """A hash of the names and shapes of its weights."""
    content: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """A hash of the bytes of those that the adapter does not bring, if that was asked for."""
    tree: list[str]
    """The lines of its `.tree` text."""


class Tensors(BaseModel):
    model_config = _STRICT

    sha256: str = _HASH
    """Of the file."""
    added: list[str]
    """What the patch added."""
    base: list[str]
    """Weights of the base that trained with it."""


class Manifest(BaseModel):
    model_config = _STRICT

    format: int
    adapter: str | None
    """The name given to `apply`."""
    libraries: dict[str, str]
    params: dict[str, Any]
    allow_import: list[str]
    """What the caller of `apply` permitted. Told, never acted on: who loads decides anew."""
    changes: list[Change]
    tensors: Tensors
    base: Base
    rules: dict[str, Any]
    """A `RuleSet` as JSON, params included."""

    def to_json(self) -> str:
        """A fact a line, so that two can be compared; the rules, which nobody reads in this form, in one."""
        body = self.model_dump(mode="json")
        rules = json.dumps(body.pop("rules"))
        return f'{_laid_out(body)[:-2]},\n "rules": {rules}\n}}\n'

    @classmethod
    def from_json(cls, text: bytes, path: str | PathLike[str]) -> Manifest:
        """Raises `Error` (GP602) where the text is no manifest of this format."""
        try:
            head = json.loads(text)
        except (ValueError, RecursionError):
            raise unreadable(path, "it is not JSON, or cut off") from None
        if not isinstance(head, dict) or "format" not in head or "tensors" not in head:
            raise unreadable(path, "it is JSON, but no adapter of graphpatch")
        if head["format"] != FORMAT or isinstance(head["format"], bool):
            raise unreadable(path, f"its format is {str(head['format'])[:40]}, and this version reads {FORMAT}")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(str(part)[:60] for part in first["loc"][:6])
            raise unreadable(path, f"{where}: {first['msg']}") from None

    def rule_set(self, path: str | PathLike[str]) -> RuleSet:
        """Raises `Error` (GP602) where the rules are none."""
        try:
            return RuleSet.from_json(json.dumps(self.rules))
        except (Error, ValueError, RecursionError) as error:
            raise unreadable(path, f"its rules cannot be read: {_brief(error)}") from None

    def base_tree(self, path: str | PathLike[str]) -> Tree:
        """Raises `Error` (GP602) where the tree is none, or not the one of the fingerprint."""
        try:
            tree = Tree.from_text("\n".join(self.base.tree) + "\n", f"{fspath(path)}, base.tree")
        except (Error, RecursionError) as error:
            raise unreadable(path, f"its tree cannot be read: {_brief(error)}") from None
        if tree.fingerprint != self.base.fingerprint:
            raise unreadable(path, "its tree and the fingerprint beside it do not belong together: it was edited")
        return tree


def _laid_out(value: Any, depth: int = 0) -> str:
    """JSON with a line for each entry of its outer levels."""
    texts = depth == 2 and isinstance(value, list) and all(isinstance(item, str) for item in value)
    if not value or not isinstance(value, (dict, list)) or not (depth < 2 or texts):
        return json.dumps(value)
    pad = " " * (depth + 1)
    if isinstance(value, dict):
        entries = [f"{json.dumps(key)}: {_laid_out(item, depth + 1)}" for key, item in value.items()]
    else:
        entries = [_laid_out(item, depth + 1) for item in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n{pad}" + f",\n{pad}".join(entries) + f"\n{pad[:-1]}{closing}"


def unreadable(path: str | PathLike[str], why: str) -> Error:
    return Error(
        Diagnostic(
            "GP602",
            f"{fspath(path)} is no adapter that can be read",
            text=(why,),
            fixes=("copy the folder anew, or save the adapter again",),
        )
    )


def _brief(error: Exception) -> str:
    if isinstance(error, Error):
        first = error.diagnostics[0]
        return ": ".join([first.title, *first.text[:1]])
    return type(error).__name__
