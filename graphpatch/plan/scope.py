"""Where names get their meaning: params, configs and roles, for each place an expression may stand in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from ..lang.diagnostics import Diagnostic, Error, Place, PlanError, Source, Span, did_you_mean
from ..lang.evaluate import EvaluationError, MissingKey, evaluate, unknown_function
from ..lang.program import Program, check_type
from ..lang.syntax import Arg, Expr, SelectorUnion
from ..tree.tree import Tensor, Tree


class World:
    """One planning: a program against a tree. Params are worked out once, when first asked for."""

    def __init__(self, program: Program, tree: Tree):
        self.program, self.tree = program, tree
        self._params: dict[tuple[int, str], Any] = {}
        self._open: list[tuple[int, str]] = []
        self._counts: dict[tuple[int, SelectorUnion], int] = {}

    def scope(self, file: int) -> FileScope:
        return FileScope(self, file)

    def param(self, file: int, name: str, span: Span | None) -> Any:
        """The value of a param visible from `file`: the caller's, else that of the `use`, else the default."""
        owner, declared = self.program.param(file, name)
        key = (owner, name)
        if key in self._params:
            return self._params[key]
        scope = self.scope(owner)
        if key in self._open:
            chain = " -> ".join(n for _, n in [*self._open[self._open.index(key) :], key])
            scope.fail("GP221", f"the default of `{name}` needs itself", declared.span, chain)
        if name in self.program.params:
            value = self.program.params[name]
        else:
            self._open.append(key)
            try:
                expr, from_file = self.program.binding(owner, name)
                value = scope.at(from_file).value(expr)
                value = check_type(value, declared, self.program.source(from_file), expr.span)
            finally:
                self._open.pop()
        self._params[key] = value
        return value

    def params(self) -> dict[str, Any]:
        """The params of all files, by name, but for those whose default has no value for this model.

        Asked for once the rules are worked out: what they use has a value then, and the rest harms nobody.
        """
        values: dict[str, Any] = {}
        for file, name in self.program.declared_params():
            try:
                values[name] = self.param(file, name, None)
            except Error:
                continue
        return values

    def count(self, file: int, selector: SelectorUnion) -> int:
        # A check without a model counts nothing, and starts faster without the matcher.
        from ..tree.select import compile_selector, match

        key = (file, selector)
        if key not in self._counts:
            (hits,) = match(self.tree, [compile_selector(selector, self.scope(file))])
            self._counts[key] = len(hits.nodes) + len(hits.parameters)
        return self._counts[key]


class FileScope:
    """The names a file sees: for selectors, for `when`, `require`, `param` and `expect`. `config` is the root's."""

    where_config = "the model"

    def __init__(self, world: World, file: int):
        self.world, self.file = world, file

    def at(self, file: int) -> FileScope:
        return self if file == self.file else FileScope(self.world, file)

    @property
    def source(self) -> Source:
        return self.world.program.source(self.file)

    def fail(
        self, code: str, title: str, span: Span | None = None, label: str = "", fixes: tuple[str, ...] = ()
    ) -> NoReturn:
        raise PlanError(self.finding(code, title, span, label, fixes))

    def finding(
        self, code: str, title: str, span: Span | None = None, label: str = "", fixes: tuple[str, ...] = (), **more: Any
    ) -> Diagnostic:
        places = (Place(self.source, span, label),) if span else ()
        text = more.pop("text", ())
        if not span and label:
            text = (label, *text)
        return Diagnostic(code, title, places, text=text, fixes=fixes, **more)

    # ── for selectors ──
    def alias(self, name: str, span: Span | None) -> tuple[SelectorUnion, FileScope]:
        file, alias = self.world.program.alias(self.file, name)
        return alias.selector, self.at(file)

    def integer(self, bound: Expr, what: str = "an index") -> int:
        value = self.value(bound)
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail("GP222", f"{what} must be an integer, and this is {show(value)}", bound.span)
        return value

    # ── for expressions ──
    def value(self, expr: Expr) -> Any:
        """The value; raises `PlanError` with the place where it has none."""
        try:
            return evaluate(expr, self)
        except EvaluationError as error:
            self.fail("GP220", str(error), error.span or expr.span)

    def var(self, name: str, span: Span | None) -> Any:
        return self.world.param(self.file, name, span)

    def name(self, dotted: str, span: Span | None) -> Any:
        head, *rest = dotted.split(".")
        if head != "config":
            raise EvaluationError(
                f"`{head}` means nothing here: quote it if it is text, or write `${head}` if it is a param", span
            )
        return self._config(rest, span)

    def query(self, function: str, selector: SelectorUnion, span: Span | None) -> Any:
        found = self.world.count(self.file, selector)
        return found > 0 if function == "has" else found

    def call(self, name: str, arguments: tuple[Arg, ...], span: Span | None) -> Any:
        raise unknown_function(name, span)

    # ── config ──
    def config(self) -> Mapping[str, Any] | None:
        tree = self.world.tree
        config = tree.config_of(0)
        if config is None:
            # A LightningModule stands for the model in it, as it does for what is anchored.
            from ..tree.match import inner_model

            inner = inner_model(tree)
            config = tree.config_of(inner) if inner is not None else None
        return config

    def _config(self, keys: list[str], span: Span | None) -> Any:
        config: Any = self.config()
        if config is None:
            raise MissingKey(f"{self.where_config} has no config", span)
        said = "config"
        for key in keys:
            if not isinstance(config, Mapping):
                raise MissingKey(f"`{said}` is {show(config)} and has no `{key}`", span)
            if key not in config:
                near = did_you_mean(key, config)
                raise MissingKey(f"`{said}` has no `{key}`{'; ' + near if near else ''}", span)
            config = config[key]
            said += f".{key}"
        return config


def show(value: Any) -> str:
    """A value as a rule would write it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(show, value)) + "]"
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} {value.dtype}"
    if isinstance(value, Mapping):
        return "a table of " + ", ".join(list(value)[:6])
    return repr(value)
