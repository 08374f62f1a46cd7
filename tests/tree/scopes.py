"""A scope for selectors in tests: roles from text, literal indices, complaints as `Error`."""

from __future__ import annotations

from graphpatch.lang.diagnostics import Diagnostic, Error
from graphpatch.lang.parser import parse_selector
from graphpatch.lang.syntax import SelectorUnion
from graphpatch.tree.select import Compiled, Hits, compile_selector, match
from graphpatch.tree.tree import Tree


class Roles:
    def __init__(self, **roles: str):
        self.roles = roles

    def alias(self, name, span) -> tuple[SelectorUnion, Roles]:
        if name not in self.roles:
            self.fail("GP204", f"no role is called {name}", span)
        return parse_selector(self.roles[name]), self

    def integer(self, bound) -> int:
        return bound.value if bound.kind == "literal" else {"-": -1, "+": 1}[bound.op] * self.integer(bound.operand)

    def fail(self, code, title, span=None, label="", fixes=()):
        raise Error(Diagnostic(code, title, text=(label,) if label else ()))


def compiled(text: str, **roles: str) -> Compiled:
    return compile_selector(parse_selector(text), Roles(**roles))


def hits(tree: Tree, text: str, **roles: str) -> Hits:
    (found,) = match(tree, [compiled(text, **roles)])
    return found


def paths(tree: Tree, text: str, **roles: str) -> list[str]:
    """What is hit, modules before parameters."""
    found = hits(tree, text, **roles)
    return [tree.paths[n] for n in found.nodes] + [
        f"{tree.paths[n]}.{name}" if n else name for n, name in found.parameters
    ]
