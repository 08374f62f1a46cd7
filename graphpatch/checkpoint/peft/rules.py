"""A config of PEFT as a rule file, and a rule set."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from ...lang.formatter import format_expression
from ...lang.program import parse_program
from ...lang.syntax import Literal_
from ...plan.ruleset import RuleSet
from .config import LoraConfig, read_config, refuse
from .defaults import by_targets
from .names import Named, asks_for_names, keys_of, named_targets, selectors
from .reach import (
    Cell,
    cells,
    excluded_terms,
    is_all_linear,
    module_terms,
    owner,
    parameter_terms,
    saved_terms,
    spared_terms,
)
from .terms import MODULE, PARAMETER, End, Term

NAME = "peft.rules"
"""Of the file that a rule set made of a config says it comes from."""

_KEEPS_THE_BASE = {True: None, "gaussian": "gaussian", "eva": "eva", "orthogonal": "orthogonal"}
_TAKES_FROM_THE_BASE = {"pissa": "pissa", "olora": "olora"}


def from_peft(source: str | PathLike[str] | Mapping[str, Any]) -> RuleSet:
    """The rules that a LoRA config of PEFT stands for: those of an adapter's folder, or of a mapping of its fields.

    They match what PEFT matches, module for module, on any model: lists are "any of" (one of their entries that is
    nowhere is no error), layers, patterns and exclusions mean what they mean there. Where a config does not say which
    modules are meant (`all-linear`, none at all, a regex that could run without end), the weights beside it do; without
    them, `all-linear` are the linears but for the output layer, and none are those of PEFT's table of model types.
    `graphpatch import DIR` prints the rules as a file.

    Raises `Error`: GP621 where it cannot be read, GP622 for a field that no rule can follow, GP627 for a regular
    expression that could run without end.
    """
    if isinstance(source, Mapping):
        return rule_set(rules_text(read_config(source), "the config"))
    config, what = read_config(source), fspath(source)
    keys = keys_of(Path(source)) if asks_for_names(config) else []
    if keys:
        return rule_set(rules_of_names(config, what, named_targets(config, keys), loading=False))
    return rule_set(rules_text(config, what))


def rule_set(text: str) -> RuleSet:
    return RuleSet(parse_program(text, {}, name=NAME))


def rules_text(config: LoraConfig, what: str, *, loading: bool = False) -> str:
    """`loading`: the factors come from a file, so how they would be drawn plays no part."""
    file = _File(config, what, loading)
    if config.target_modules is None and not config.target_parameters:
        file.by_model_type()
    else:
        file.targets()
    file.trained()
    return file.text(what)


def rules_of_names(
    config: LoraConfig,
    what: str,
    modules: Iterable[Named],
    parameters: Iterable[Named] = (),
    *,
    tied: Collection[str] = (),
    loading: bool = True,
) -> str:
    """The same for modules and parameters that are known by name; those that are `tied` have one adapter together."""
    file = _File(config, what, loading)
    modules = list(modules)
    file.named = [End(one.name, anchored=True) for one in modules]
    for hits, cls in ((modules, MODULE), (parameters, PARAMETER)):
        alike: dict[tuple[int, float, bool], list[str]] = {}
        for one in hits:
            alike.setdefault((one.rank, one.alpha, one.name in tied), []).append(one.name)
        for (rank, alpha, as_one), names in alike.items():
            file.patch(rank, alpha, selectors(names, cls), [], cls, tied=as_one)
    if not parameters:
        file.parameters()
    file.trained()
    return file.text(what)


class _File:
    """A rule file that is written from top to bottom."""

    def __init__(self, config: LoraConfig, what: str, loading: bool):
        self.config, self.what, self.loading = config, what, loading
        self._aliases: list[str] = []
        self._statements: list[str] = []
        self.named: list[Term] | None = None
        """The modules with an adapter, where they are known by name."""

    def targets(self) -> None:
        modules = module_terms(self.config)
        if not modules and not self.config.target_parameters:
            refuse(self.what, "target_modules", "it is empty, and target_parameters too: nothing would be changed")
        if is_all_linear(self.config):
            # The output layer is told by what Transformers calls it, and another model has none.
            with self._when("config.model_type is not none"):
                self._modules(self.config, modules)
            with self._when("config.model_type is none"):
                self._modules(self.config, modules, heads=False)
            self.parameters()
        else:
            # One of both may be nowhere.
            alone = not (modules and self.config.target_parameters)
            of_modules = self._modules(self.config, modules, alone=alone)
            of_parameters = self.parameters(alone=alone)
            if not alone:
                self._require(of_modules + of_parameters)

    def parameters(self, *, alone: bool = True) -> list[str]:
        parted = cells(self.config, parameter_terms(self.config))
        # The weight of a linear is that linear: to_peft names one so where PEFT would misread its name.
        linears = [Cell(c.rank, c.alpha, [o for t in c.terms if (o := owner(t)) is not None]) for c in parted]
        made = self._patches([cell for cell in linears if cell.terms], [], MODULE, alone=False)
        made += self._patches(parted, made, PARAMETER, alone=alone and not made)
        if alone:
            self._require(made)
        return made

    def by_model_type(self) -> None:
        known = [kind for _, kinds in by_targets() for kind in kinds]
        self._statements.append(f"require config.model_type in {_list(known)}")
        for given, kinds in by_targets():
            config = self.config.model_copy(update={"target_modules": given})
            with self._when(f"config.model_type in {_list(kinds)}"):
                self._modules(config, module_terms(config))

    @contextmanager
    def _when(self, test: str) -> Iterator[None]:
        """What is written within counts only where the test holds."""
        outside, self._statements = self._statements, []
        yield
        inner = "".join(f"  {line}\n" for text in self._statements for line in text.split("\n"))
        self._statements = [*outside, f"when {test} {{\n{inner}}}"]

    def _modules(
        self, config: LoraConfig, modules: Sequence[Term], *, heads: bool = True, alone: bool = True
    ) -> list[str]:
        made = self._patches(cells(config, modules), self._without(config, modules, heads), MODULE, alone=alone)
        if alone:
            self._require(made)
        return made

    def _without(self, config: LoraConfig, modules: Sequence[Term], heads: bool = True) -> list[str]:
        """The aliases of what is left out of these."""
        parts = (("excluded", excluded_terms(config, modules)), ("spared", spared_terms(config, heads)))
        return [self._alias(name, terms) for name, terms in parts if terms]

    def _patches(self, parted: Sequence[Cell], out: Sequence[str], cls: str, *, alone: bool = True) -> list[str]:
        """A patch of each cell; returns their aliases."""
        made: list[str] = []
        for cell in parted:
            chosen = [term.selector() for term in cell.terms]
            made.append(self.patch(cell.rank, cell.alpha, chosen, [*out, *made], cls, alone=alone and len(parted) == 1))
        return made

    def _require(self, aliases: Sequence[str]) -> None:
        """Every one of them may be empty, and all together may not."""
        if len(aliases) > 1:
            self._statements.append("require " + " or ".join(f"has(@{name})" for name in aliases))

    def patch(
        self,
        rank: int,
        alpha: float,
        chosen: Sequence[str],
        without: Sequence[str],
        cls: str,
        *,
        alone: bool = True,
        tied: bool = False,
    ) -> str:
        """A patch of what is chosen; returns the name of its alias."""
        name = self._named("targets" if cls == MODULE else "parameters", chosen)
        given = self._arguments(rank, alpha, cls == MODULE) | ({"tied": True} if tied else {})
        arguments = ", ".join(f"{k}={_value(v)}" for k, v in given.items())
        clauses = [f"with lora({arguments})"]
        if without:
            clauses.append("except " + " | ".join(f"@{other}" for other in without))
        if not alone:
            clauses.append("expect any")
        self._statements.append("\n  ".join([f"patch @{name}", *clauses]))
        return name

    def _arguments(self, rank: int, alpha: float, module: bool) -> dict[str, Any]:
        config = self.config
        given: dict[str, Any] = {"rank": rank, "alpha": int(alpha) if float(alpha).is_integer() else alpha}
        if config.lora_dropout and module:  # PEFT has none on parameters
            given["dropout"] = config.lora_dropout
        for name, ours in (("use_rslora", "use_rslora"), ("use_dora", "dora"), ("lora_bias", "bias")):
            if getattr(config, name):
                given[ours] = True
        init = _init(config, self.what, self.loading)
        return given | ({"init": init} if init else {})

    def trained(self) -> None:
        config = self.config
        self._statements.append("freeze ** except @new")
        if saved := saved_terms(config):
            self._statements.append(f"train @{self._alias('saved', saved)}")
        if config.bias == "all":
            self._statements.append("train bias:Parameter expect any")
        elif config.bias == "lora_only":
            self._lora_biases()

    def _lora_biases(self) -> None:
        modules = module_terms(self.config) if self.named is None else self.named
        if not modules:
            return
        name = self._alias("biases", [term.below("bias") for term in modules])
        out = self._without(self.config, modules) if self.named is None else []
        but = " except " + " | ".join(f"@{other}" for other in out) if out else ""
        self._statements.append(f"train @{name}{but} expect any")

    def _alias(self, name: str, terms: Sequence[Term]) -> str:
        return self._named(name, [term.selector() for term in terms])

    def _named(self, name: str, chosen: Sequence[str]) -> str:
        chosen = list(dict.fromkeys(chosen))
        body = " | ".join(chosen)
        if len(body) > 90:
            body = "\n  " + "\n  | ".join(chosen)
        known = next((a for a in self._aliases if a.partition(" = ")[2] == body), None)
        if known:
            return known.partition(" = ")[0].removeprefix("alias ")
        number = sum(a.startswith(f"alias {name}") for a in self._aliases)
        self._aliases.append(f"alias {name}{number + 1 if number else ''} = {body}")
        return f"{name}{number + 1 if number else ''}"

    def text(self, what: str) -> str:
        head = f"# LoRA as {' '.join(what.split())} says it, in PEFT's format.\n"
        return head + "\n".join(["\n".join(self._aliases), *self._statements, ""])


def _init(config: LoraConfig, what: str, loading: bool) -> str | None:
    given = config.init_lora_weights
    if given in _TAKES_FROM_THE_BASE:
        return _TAKES_FROM_THE_BASE[given]  # type: ignore[index]
    if given in _KEEPS_THE_BASE or (loading and given in (False, "mica")):
        return None if loading else _KEEPS_THE_BASE[given]
    if given is False:
        refuse(what, "init_lora_weights", "false draws B at random, so that the model would change at once")
    fixes = ["convert it where it was trained: save_pretrained(..., path_initial_model_for_weight_conversion=...)"]
    refuse(what, "init_lora_weights", f"{given!r} changes the base weights in a way that is not written down", *fixes)


def _list(values: Sequence[str]) -> str:
    return "[" + ", ".join(_value(value) for value in values) + "]"


def _value(value: Any) -> str:
    return format_expression(Literal_(value=value))
