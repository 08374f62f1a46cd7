"""Remarks on rules that work and could say the same better. They never change an exit code."""

from __future__ import annotations

import re
from collections.abc import Iterator

from . import syntax as s
from .diagnostics import Diagnostic, Place, Source, Span
from .names import walk


def style(rules: s.RuleFile, source: Source) -> list[Diagnostic]:
    """GP301 an alternative twice, GP302 a clause that says the default, GP303 a regex that a selector can say."""
    found: list[Diagnostic] = []
    for node in walk(rules):
        for code, title, span, label in _remarks(node):
            places = (Place(source, span, label),) if span else ()
            fixes = () if span else (label,)
            found.append(Diagnostic(code, title, places, fixes=fixes, severity="style"))
    return found


def _remarks(node: object) -> Iterator[tuple[str, str, Span | None, str]]:
    if isinstance(node, (s.Step, s.KeyStep)):
        yield from _repeated(node.name, node.alternative_spans or (), node.span)
    elif isinstance(node, s.SelectorUnion):
        for position, branch in enumerate(node.branches):
            if branch in node.branches[:position]:
                yield "GP301", "this branch stands twice", branch.span, "drop one"
    elif isinstance(node, s.Expect):
        if not node.any and node.per is None and node.cmp == ">=" and node.count == s.Literal_.model_construct(value=1):
            yield "GP302", "`expect >= 1` is the default", node.span, "drop it"
    elif isinstance(node, s.RegexSelector):
        plain = _plain(node.pattern)
        if plain is not None:
            yield (
                "GP303",
                "a selector can say this regex",
                node.span,
                f"write {plain}" + (f":{node.cls}" if node.cls else ""),
            )


def _repeated(name: str, spans: tuple[Span, ...], whole: Span | None) -> Iterator[tuple[str, str, Span | None, str]]:
    position = 0
    for braces in re.findall(r"\{([^}]*)\}", name):
        seen: set[str] = set()
        for word in braces.split(","):
            if word in seen:
                span = spans[position] if position < len(spans) else whole
                yield "GP301", f"`{word}` stands twice in these braces", span, "drop one"
            seen.add(word)
            position += 1


def _plain(pattern: str) -> str | None:
    """The selector that means what a simple regex means, where there is one."""
    floating, body = (True, pattern[4:]) if pattern.startswith(".*\\.") else (False, pattern)
    steps: list[str] = []
    for part in body.split("\\."):
        if part == "\\d+" and steps and "[" not in steps[-1]:
            steps[-1] += "[*]"
        elif part == ".*" and part is not body:
            steps.append("**")
        elif re.fullmatch(r"\w+", part):
            steps.append(part)
        elif choice := re.fullmatch(r"(\w*)\((?:\?:)?(\w+(?:\|\w+)+)\)(\w*)", part):
            steps.append(f"{choice[1]}{{{choice[2].replace('|', ',')}}}{choice[3]}")
        else:
            return None
    if not steps or steps[-1] == "**" or "**" in steps:
        # `.*` needs at least one character where `**` is also none.
        return None
    return ("" if floating else "^") + ".".join(steps)
