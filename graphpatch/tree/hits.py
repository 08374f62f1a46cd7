"""What one selector matched."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from itertools import chain

from .bindings import Aligner
from .compile import Compiled
from .ranges import OutOfRange
from .tree import Parameter, Tree


class Hits:
    """What one `Compiled` matched: modules and parameters, sorted in tree order, each tied one once."""

    nodes: list[int]
    parameters: list[Parameter]

    def __init__(self, tree: Tree, compiled: Compiled):
        self._tree, self._compiled = tree, compiled
        self._node_runs: list[tuple[int, list[int]]] = []
        self._parameter_runs: list[tuple[int, str, list[int]]] = []
        self.out_of_range: list[OutOfRange] = []
        """Single indices that hit in no container they were asked of: errors, whatever else was hit."""

    def _finish(self) -> None:
        tree = self._tree
        runs = self._node_runs
        self.nodes = list(runs[0][1]) if len(runs) == 1 else list(chain.from_iterable(nodes for _, nodes in runs))
        # Nodes reached by several paths, or by a regex and by a path, stand in several runs.
        if len(runs) != 1 or tree.places:
            self.nodes = sorted(set(self.nodes))
        found: Iterable[Parameter] = ((n, name) for _, name, nodes in self._parameter_runs for n in nodes)
        if tree.ties:
            first = tree.first_of
            found = (first.get(p, p) for p in found)
        self.parameters = list(found)
        if len(self._parameter_runs) != 1 or tree.places or tree.ties:
            self.parameters = sorted(set(self.parameters), key=self._place)

    def _place(self, parameter: Parameter) -> tuple[int, int, str]:
        order = self._orders.get(self._tree.signature_of[parameter[0]])
        if order is None:
            signature = self._tree.signature(parameter[0])
            order = self._orders[self._tree.signature_of[parameter[0]]] = {
                n: i for i, n in enumerate(signature.parameters)
            }
        return (parameter[0], order.get(parameter[1], len(order)), parameter[1])

    @cached_property
    def _orders(self) -> dict[int, dict[str, int]]:
        return {}

    def __len__(self) -> int:
        return len(self.nodes) + len(self.parameters)

    @cached_property
    def _masks(self) -> dict[int | Parameter, int]:
        masks: dict[int | Parameter, int] = defaultdict(int)
        for mask, nodes in self._node_runs:
            for node in nodes:
                masks[node] |= mask
        first = self._tree.first_of
        for mask, name, nodes in self._parameter_runs:
            for node in nodes:
                masks[first.get((node, name), (node, name))] |= mask
        return masks

    def alternatives(self, hit: int | Parameter) -> int:
        """The alternatives the hit took part in, as a bit mask over `Compiled.alternatives`."""
        return self._masks.get(hit, 0) if self._compiled.alternatives else 0

    @cached_property
    def _aligner(self) -> Aligner:
        return Aligner(self._tree, self._compiled)

    def bindings(self, hit: int | Parameter) -> dict[str, int]:
        """The captured indices of a hit, by name. Where it matches in several ways, its first path counts, and there
        the outermost place."""
        return self._aligner.bindings(hit)
