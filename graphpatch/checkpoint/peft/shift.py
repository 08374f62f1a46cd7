"""An adapter made on a model that stood elsewhere: the same modules, under another beginning of their names.

A backbone that is now inside a model with a head (`layers.0` is `model.layers.0`), a model that became part of another,
a family whose names changed between versions (`language_model.model.layers`, `model.language_model.layers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...lang.diagnostics import Diagnostic
from ...tree.tree import Tree


class Moved(NamedTuple):
    """The beginning of all names, in the file and in the model; either may be empty, else it ends in a dot."""

    before: str
    now: str

    def here(self, name: str) -> str:
        return self.now + name.removeprefix(self.before) if name.startswith(self.before) else name

    def there(self, name: str) -> str:
        return self.before + name.removeprefix(self.now) if name.startswith(self.now) else name

    def warning(self, what: str) -> str:
        was, now = (part.rstrip(".") or "the root" for part in self)
        found = Diagnostic(
            "GP629",
            f"the modules of {what} are elsewhere in this model: all below {was} is taken for what is below {now}",
            fixes=("if that is another part of the model, load the adapter onto the part it was made for",),
            severity="warning",
        )
        return found.render()


def moved_to(tree: Tree, paths: Sequence[str]) -> Moved | None:
    """The one way in which all these paths of modules are in the tree, if they are not there as they stand."""
    bare = list(dict.fromkeys(path.replace(".base_layer", "") for path in paths))
    there = set(tree.paths)
    if not bare or any(path in there for path in bare):
        return None
    first = bare[0].split(".")
    for drop in range(len(first)):
        before, tail = "".join(f"{s}." for s in first[:drop]), ".".join(first[drop:])
        if not all(path.startswith(before) for path in bare):
            return None
        ways = [Moved(before, p.removesuffix(tail)) for p in tree.paths if p == tail or p.endswith(f".{tail}")]
        ways = [way for way in ways if all(way.here(path) in there for path in bare)]
        if ways:
            return ways[0] if len(ways) == 1 else None
    return None
