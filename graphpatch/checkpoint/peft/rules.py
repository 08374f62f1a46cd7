"""A config of PEFT as a rule file, and a rule set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike, fspath
from typing import Any

from ...lang.formatter import format_expression
from ...lang.program import parse_program
from ...lang.syntax import Literal_
from ...plan.ruleset import RuleSet
from .config import LoraConfig, read_config, refuse
from .defaults import by_targets
from .reach import Cell, cells, excluded_terms, module_terms, parameter_terms, saved_terms, spared_terms
from .terms import End, Term

NAME = "peft.rules"
"""Of the file that a rule set made of a config says it comes from."""

_KEEPS_THE_BASE = {True: None, "gaussian": "gaussian", "eva": "eva", "orthogonal": "orthogonal"}
_TAKES_FROM_THE_BASE = {"pissa": "pissa", "olora": "olora"}


def from_peft(source: str | PathLike[str] | Mapping[str, Any]) -> RuleSet:
    """The rules that a LoRA config of PEFT stands for: those of an adapter's folder, or of a mapping of its fields.

    They match what PEFT matches, module for module, on any model: lists are "any of" (one of their entries that is
    nowhere is no error), layers, patterns and exclusions mean what they mean there. `str(...)` of it is no file; the
    text is `rules.program.source(0).text`, and `graphpatch import DIR` prints it.

    Raises `Error`: GP621 where it cannot be read, GP622 for a field that no rule can follow, GP627 for a regular
    expression that could run without end.
    """
    what = "the config" if isinstance(source, Mapping) else fspath(source)
    return rule_set(rules_text(read_config(source), what))


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
    config: LoraConfig, what: str, named: Iterable[tuple[str, int, float]], parameters: Iterable[tuple[str, int, float]]
) -> str:
    """The same for modules and parameters that are known by name, each with its rank and alpha."""
    file = _File(config, what, loading=True)
    for hits, cls in ((named, "Module"), (parameters, "Parameter")):
        alike: dict[tuple[int, float], list[Term]] = {}
        for name, rank, alpha in hits:
            alike.setdefault((rank, alpha), []).append(End(name, anchored=True, cls=cls))
        for (rank, alpha), terms in alike.items():
            file.patch(Cell(rank, alpha, terms), [], dropout=cls == "Module")
    file.trained()
    return file.text(what)


class _File:
    """A rule file that is written from top to bottom."""

    def __init__(self, config: LoraConfig, what: str, loading: bool):
        self.config, self.what, self.loading = config, what, loading
        self._aliases: list[str] = []
        self._statements: list[str] = []
        self._targets: list[str] = []
        """The aliases of what is patched."""

    def targets(self) -> None:
        modules, parameters = module_terms(self.config), parameter_terms(self.config)
        if not modules and not parameters:
            refuse(self.what, "target_modules", "it is empty, and target_parameters too: nothing would be changed")
        self._cells(modules, self._without(self.config, modules))
        self._cells(parameters, [])

    def by_model_type(self) -> None:
        known: list[str] = []
        for given, kinds in by_targets():
            body, self._statements = self._statements, []
            config = self.config.model_copy(update={"target_modules": given})
            modules = module_terms(config)
            self._cells(modules, self._without(config, modules))
            inner = "".join(f"  {line}\n" for text in self._statements for line in text.split("\n"))
            self._statements = [*body, f"when config.model_type in {_list(kinds)} {{\n{inner}}}"]
            known += kinds
        self._statements.insert(0, f"require config.model_type in {_list(known)}")

    def _without(self, config: LoraConfig, modules: Sequence[Term]) -> list[str]:
        """The aliases of what is left out of these."""
        parts = (("excluded", excluded_terms(config, modules)), ("spared", spared_terms(config)))
        return [self._alias(name, terms) for name, terms in parts if terms]

    def _cells(self, terms: Sequence[Term], out: Sequence[str]) -> None:
        earlier: list[str] = []
        parted = cells(self.config, terms)
        for cell in parted:
            earlier.append(self.patch(cell, [*out, *earlier], alone=len(parted) == 1))
        if len(parted) > 1:
            # Every part may be empty, and all together may not.
            self._statements.append("require " + " or ".join(f"has(@{name})" for name in earlier))

    def patch(self, cell: Cell, without: Sequence[str], *, alone: bool = True, dropout: bool = True) -> str:
        """A patch of what is in the cell; returns the name of its alias."""
        name = self._alias("targets" if cell.terms[0].cls != "Parameter" else "parameters", cell.terms)
        self._targets.append(name)
        arguments = ", ".join(f"{k}={_value(v)}" for k, v in self._arguments(cell, dropout).items())
        clauses = [f"with lora({arguments})"]
        if without:
            clauses.append("except " + " | ".join(f"@{other}" for other in without))
        if not alone:
            clauses.append("expect any")
        self._statements.append("\n  ".join([f"patch @{name}", *clauses]))
        return name

    def _arguments(self, cell: Cell, dropout: bool) -> dict[str, Any]:
        config = self.config
        alpha = int(cell.alpha) if float(cell.alpha).is_integer() else cell.alpha
        given: dict[str, Any] = {"rank": cell.rank, "alpha": alpha}
        if config.lora_dropout and dropout:
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
        modules = module_terms(self.config)
        name = self._alias("biases", [term.below("bias") for term in modules])
        out = self._without(self.config, modules)
        but = " except " + " | ".join(f"@{other}" for other in out) if out else ""
        self._statements.append(f"train @{name}{but} expect any")

    def _alias(self, name: str, terms: Sequence[Term]) -> str:
        selectors = list(dict.fromkeys(term.selector() for term in terms))
        body = " | ".join(selectors)
        if len(body) > 90:
            body = "\n  " + "\n  | ".join(selectors)
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
