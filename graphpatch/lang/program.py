"""A rule file with everything it uses, resolved: what the planner works on and what JSON carries."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from . import syntax as s
from .diagnostics import Diagnostic, Place, RuleError, Source, did_you_mean
from .formatter import format_rules
from .library import LIBRARY as LIBRARY
from .library import Found, find, find_packaged, find_path, read
from .names import check_names
from .parser import decode, parse_rules
from .values import Setting as Setting
from .values import check_type

MOST_FILES = 200
DEEPEST_USE = 40


class LoadedFile(BaseModel):
    """One rule file. `uses` are the indices in `Program.files` of what its `use` statements name, in their order."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    name: str
    """What diagnostics call it: the path as given, `roles.rules` for a packaged one."""
    text: str
    sha256: str
    """Of the text in UTF-8."""
    rules: s.RuleFile
    uses: tuple[int, ...] = ()
    packaged: bool = False


class Program(BaseModel):
    """Files with all they use; `files[0]` is the one asked for. Files are named by their index.

    Made by `load_program`, `parse_program` and `Program.of`, which check it; every name in it has its meaning.
    `params` are the caller's values; what the caller leaves open is an expression, worked out against a model's config.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    format: Literal[1] = 1
    files: tuple[LoadedFile, ...]
    params: dict[str, Any] = {}

    # ── making ──

    @classmethod
    def of(cls, rules: s.RuleFile, params: Mapping[str, Any] | None = None, name: str = "<rules>") -> Program:
        """The program of rules that were built in Python. Its text is the formatted file."""
        return parse_program(format_rules(rules), params, name)

    @classmethod
    def from_json(cls, text: str | bytes) -> Program:
        """The inverse of `model_dump_json`; raises `RuleError` (GP212) for anything else.

        A file may leave out its text, and then has the formatted one.
        """
        try:
            return _checked(cls.model_validate_json(text))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            what = f"{where}: {first['msg']}" if where else str(first["msg"])
            raise RuleError(Diagnostic("GP212", "this JSON is no rule set", text=(what,))) from None

    # ── reading ──

    def source(self, file: int) -> Source:
        return self._sources[file]

    def statements(self) -> Iterator[tuple[int, s.ConditionalStatement]]:
        """The statements that do something, each with its file; those of a used file where it is first used."""
        seen: set[int] = set()

        def walk(file: int) -> Iterator[tuple[int, s.ConditionalStatement]]:
            seen.add(file)
            uses = iter(self.files[file].uses)
            for statement in self.files[file].rules.statements:
                if isinstance(statement, s.Use):
                    used = next(uses)
                    if used not in seen:
                        yield from walk(used)
                elif not isinstance(statement, (s.Param, s.Alias)):
                    yield file, statement

        return walk(0)

    def visible(self, file: int) -> frozenset[int]:
        """The files whose names `file` sees: itself, and all it uses, directly or not."""
        return self._visible[file]

    def alias(self, file: int, name: str) -> tuple[int, s.Alias]:
        """The file that defines the role `@name` as `file` sees it, and the definition; raises `RuleError` (GP213)."""
        owner, alias = self._named(self._aliases, file, name, "GP213", f"there is no role `@{name}`")
        return owner, alias

    def param(self, file: int, name: str) -> tuple[int, s.Param]:
        """The file that declares `$name` as `file` sees it, and the declaration; raises `RuleError` (GP214)."""
        owner, param = self._named(self._params, file, name, "GP214", f"there is no param `${name}`")
        return owner, param

    def declared_params(self) -> Iterator[tuple[int, str]]:
        """All params, each with its file."""
        return ((owner, name) for name, (owner, _) in self._params.items())

    def binding(self, file: int, name: str) -> tuple[s.Expr, int]:
        """What a param that the caller left open is: an expression, and the file whose names it uses.

        `file` is the one that declares it. Raises `RuleError` (GP215) where it needs a value and has none.
        """
        for user, loaded in enumerate(self.files):
            for used, statement in zip(loaded.uses, _uses(loaded.rules)):
                for arg in statement.args if used == file else ():
                    if arg.name == name:
                        return arg.value, user
        _, declared = self._params[name]
        if declared.default is None:
            raise RuleError(self._missing(file, declared))
        return declared.default, file

    def style(self) -> list[Diagnostic]:
        """Remarks (GP3xx) on the files that are not packaged."""
        from .style import style

        return [d for i, f in enumerate(self.files) if not f.packaged for d in style(f.rules, self.source(i))]

    def missing(self) -> list[Diagnostic]:
        """The params that need a value and have none."""
        found = []
        for name, (owner, declared) in self._params.items():
            if name not in self.params and declared.default is None and name not in self._given_by_use(owner):
                found.append(self._missing(owner, declared))
        return found

    def _missing(self, file: int, declared: s.Param) -> Diagnostic:
        type_ = f" ({declared.type})" if declared.type else ""
        place = (Place(self.source(file), declared.span, "it has no default"),) if declared.span else ()
        fix = f"--set {declared.name}=..., or load(..., {declared.name}=...)"
        return Diagnostic("GP215", f"`{declared.name}`{type_} needs a value", place, fixes=(fix,))

    def _given_by_use(self, file: int) -> dict[str, tuple[int, s.Arg]]:
        """The params of a file that a `use` gives: the using file and what it gives."""
        return {
            arg.name: (user, arg)
            for user, loaded in enumerate(self.files)
            for used, statement in zip(loaded.uses, _uses(loaded.rules))
            for arg in statement.args
            if used == file and arg.name is not None
        }

    def _named(
        self, table: Mapping[str, tuple[int, Any]], file: int, name: str, code: str, title: str
    ) -> tuple[int, Any]:
        owner, node = table.get(name, (-1, None))
        if owner in self.visible(file):
            return owner, node
        known = sorted(n for n, (o, _) in table.items() if o in self.visible(file))
        fix = did_you_mean(name, known) or (f"there are {', '.join(known)}" if known else "")
        raise RuleError(Diagnostic(code, title, fixes=(fix,) if fix else ()))

    @cached_property
    def _sources(self) -> list[Source]:
        return [Source(file.name, file.text) for file in self.files]

    @cached_property
    def _visible(self) -> list[frozenset[int]]:
        def closure(file: int) -> frozenset[int]:
            reached, todo = {file}, [file]
            while todo:
                for used in self.files[todo.pop()].uses:
                    if used not in reached:
                        reached.add(used)
                        todo.append(used)
            return frozenset(reached)

        return [closure(file) for file in range(len(self.files))]

    @cached_property
    def _aliases(self) -> dict[str, tuple[int, s.Alias]]:
        return {x.name: (i, x) for i, f in enumerate(self.files) for x in f.rules.statements if isinstance(x, s.Alias)}

    @cached_property
    def _params(self) -> dict[str, tuple[int, s.Param]]:
        return {x.name: (i, x) for i, f in enumerate(self.files) for x in f.rules.statements if isinstance(x, s.Param)}


def load_program(
    name_or_path: str | os.PathLike[str], params: Mapping[str, Any] | None = None, *, complete: bool = True
) -> Program:
    """The program of a file, or of a packaged name. Raises `RuleError` with all that is wrong in it and what it uses.

    `complete` asks that every param without a default has a value; a check of a file alone does without.
    """
    found = find(name_or_path)
    loader = _Loader()
    loader.load(found, read(found))
    return _finished(loader, params, complete)


def parse_program(
    text: str | bytes, params: Mapping[str, Any] | None = None, name: str = "<rules>", *, complete: bool = True
) -> Program:
    """The program of a text. Its `use` finds packaged names and absolute paths. Raises `RuleError`."""
    loader = _Loader()
    loader.load(Found(None, name, False), text)  # type: ignore[arg-type]
    return _finished(loader, params, complete)


def _finished(loader: _Loader, params: Mapping[str, Any] | None, complete: bool) -> Program:
    if loader.findings:
        raise RuleError(loader.findings)
    program = Program.model_construct(files=tuple(loader.files), params={})
    findings = check_names(program)
    if findings:
        raise RuleError(findings)
    program = program.model_copy(update={"params": _given(program, params or {})})
    if complete and (missing := program.missing()):
        raise RuleError(missing)
    return program


def _given(program: Program, params: Mapping[str, Any]) -> dict[str, Any]:
    """The caller's values, as their params take them."""
    values: dict[str, Any] = {}
    findings: list[Diagnostic] = []
    declared = {name: program.param(file, name) for file, name in program.declared_params()}
    for name, value in params.items():
        if name not in declared:
            near = did_you_mean(str(name), declared)
            known = near or (f"there are {', '.join(sorted(declared))}" if declared else "the rules declare no param")
            findings.append(Diagnostic("GP214", f"there is no param `{name}`", fixes=(known,)))
            continue
        owner, param = declared[name]
        bound = program._given_by_use(owner).get(name)
        if bound is not None:
            user, arg = bound
            place = (Place(program.source(user), arg.span, "here"),) if arg.span else ()
            findings.append(
                Diagnostic("GP216", f"`{name}` is already given by a `use`", place, fixes=("leave one of them out",))
            )
            continue
        try:
            values[name] = check_type(value, param)
        except RuleError as error:
            findings += error.diagnostics
    if findings:
        raise RuleError(findings)
    return values


def _uses(rules: s.RuleFile) -> list[s.Use]:
    return [statement for statement in rules.statements if isinstance(statement, s.Use)]


class _Loader:
    """Reads a file and what it uses; what is wrong goes to `findings`."""

    def __init__(self) -> None:
        self.files: list[Any] = []
        self.index: dict[str, int] = {}
        self.args: dict[int, tuple[Place | None, tuple[s.Arg, ...]]] = {}
        self.open: list[int] = []
        self.findings: list[Diagnostic] = []

    def load(self, found: Found, data: str | bytes) -> int:
        number = len(self.files)
        self.files.append(None)
        if found.path is not None:
            self.index[os.path.realpath(found.path)] = number
        rules, text, uses = s.RuleFile.model_construct(), "", []
        try:
            text = decode(data, found.name)
            rules = parse_rules(text, found.name)
        except RuleError as error:
            self.findings += error.diagnostics
        folder = os.path.dirname(found.name) if found.path is not None and not found.packaged else None
        if found.packaged:
            folder = os.path.dirname(found.path)
        self.open.append(number)
        for use in _uses(rules):
            place = Place(Source(found.name, text), use.target_span) if use.target_span else None
            try:
                uses.append(self.use(use, folder, place))
            except RuleError as error:
                self.findings += error.diagnostics
        self.open.pop()
        self.files[number] = LoadedFile.model_construct(
            name=found.name,
            text=text,
            sha256=hashlib.sha256(text.encode()).hexdigest(),
            rules=rules,
            uses=tuple(uses),
            packaged=found.packaged,
        )
        return number

    def use(self, use: s.Use, folder: str | None, place: Place | None) -> int:
        found = find_path(use.target, folder, place) if use.by_path else find_packaged(use.target, place)
        known = self.index.get(os.path.realpath(found.path))
        if known is None:
            if len(self.files) >= MOST_FILES or len(self.open) >= DEEPEST_USE:
                raise _at("GP217", f"more than {MOST_FILES} files, or {DEEPEST_USE} deep", place, "use fewer")
            known = self.load(found, read(found, place))
            self.args[known] = (place, use.args)
            return known
        if known in self.open:
            raise _at("GP217", f"`{use.target}` uses itself", place, "this closes a circle of `use`")
        first, args = self.args[known]
        if {a.name: a.value for a in args} != {a.name: a.value for a in use.args}:
            also = (Place(first.source, first.span, "the first one"),) if first else ()
            raise _at(
                "GP218", f"`{use.target}` is used twice with different params", place, "give the same in both", also
            )
        return known


def _at(code: str, title: str, place: Place | None, label: str, also: tuple[Place, ...] = ()) -> RuleError:
    if place is None:
        return RuleError(Diagnostic(code, title, also, fixes=(label,)))
    return RuleError(Diagnostic(code, title, (Place(place.source, place.span, label), *also)))


def _checked(program: Program) -> Program:
    """A program that came from outside, with all that a made one is sure of; raises `RuleError`."""

    def refuse(what: str) -> RuleError:
        return RuleError(Diagnostic("GP212", "this JSON is no rule set", text=(what,)))

    if not program.files:
        raise refuse("it has no files")
    files = []
    for file in program.files:
        text = file.text or format_rules(file.rules)
        rules = parse_rules(text, file.name)
        if file.rules != rules:
            raise refuse(f"the rules of {file.name} are not what its text says")
        digest = hashlib.sha256(text.encode()).hexdigest()
        if file.sha256 and file.sha256 != digest:
            raise refuse(f"the text of {file.name} is not the one that its hash was made from")
        if len(file.uses) != len(_uses(rules)) or not all(0 < used < len(program.files) for used in file.uses):
            raise refuse(f"the uses of {file.name} name no files")
        # The spans too are those of the text.
        files.append(file.model_copy(update={"text": text, "rules": rules, "sha256": digest}))
    program = program.model_copy(update={"files": tuple(files)})
    for number, file in enumerate(program.files):
        if any(number in program.visible(used) for used in file.uses):
            raise refuse(f"{file.name} uses itself")
    findings = check_names(program)
    if findings:
        raise RuleError(findings)
    return program.model_copy(update={"params": _given(program, program.params)})
