"""One selector against a model: what the command line's `match` and a notebook ask."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from ..lang.diagnostics import Source, Span
from ..lang.parser import parse_selector
from ..lang.program import parse_program
from ..tree.select import Compiled, Hits, compile_selector, match, select_paths
from ..tree.tree import Tree
from .scope import FileScope, World

if TYPE_CHECKING:
    import torch


def matches(tree: Tree, selector: str) -> tuple[Compiled, Hits]:
    """The selector made concrete, and what it matches; raises `RuleError` or `PlanError` for one that means nothing.

    It stands in no file: it sees the packaged roles, and no params.
    """
    compiled = _compiled(tree, selector)
    (hits,) = match(tree, [compiled])
    return compiled, hits


def _compiled(tree: Tree, selector: str) -> Compiled:
    union = parse_selector(selector)
    world = World(parse_program("use roles", {}, name="<selector>"), tree)
    return compile_selector(union, SelectorScope(world, selector))


class SelectorScope(FileScope):
    """The scope of a selector from the command line: its source is its own text."""

    def __init__(self, world: World, text: str):
        super().__init__(world, 0)
        self.text = text

    def var(self, name: str, span: Span | None) -> NoReturn:
        self.fail("GP226", f"`${name}` has no value", span, "a selector that stands in no file sees no params")

    @property
    def source(self) -> Source:
        return Source("<selector>", self.text)


def select(model_or_tree: torch.nn.Module | Tree, selector: str) -> list[str]:
    """The paths of the modules and parameters that a selector matches, each once by its first path, in tree order.

    Roles are those of the packaged `roles.rules`. Matching nothing gives an empty list.
    """
    tree = model_or_tree if isinstance(model_or_tree, Tree) else Tree.of(model_or_tree)
    return select_paths(tree, _compiled(tree, selector))
