"""All patterns as one automaton: positions are bits of an integer, states are made when first reached.

This is Shift-And over Glushkov positions (Navarro and Raffinot, Flexible Pattern Matching in Strings, 2002, section 2.2
and 4.2): with `accepts` the tests that accept a segment, `next = ((state & accepts) << 1) | (state & gaps)`. A pattern
of r tests has r + 1 bits; bit j says that j tests are behind. Cost per step is that of a few operations on integers,
for any number of patterns, and a step once made is looked up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .globs import glob_regex
from .pattern import Bounds, Indices, Names, Pattern, within
from .tree import Segment


class Automaton:
    def __init__(self, patterns: Sequence[Pattern]):
        self.start = 0
        """Where the root stands."""
        self.restart = 0
        """What is added where matching starts anew: the beginnings of the anchored patterns."""
        self._gaps = 0
        self._final: dict[int, int] = {}
        self._final_modules = self._final_parameters = 0
        self._literals: dict[str, int] = {}
        self._globs: dict[str, int] = {}
        self._anything = self._every = 0
        self._at: dict[int, int] = {}
        self._spans: dict[Bounds, int] = {}
        self._accepts: dict[Segment, int] = {}
        bit = 1
        for number, pattern in enumerate(patterns):
            self.start |= bit
            if pattern.anchored:
                self.restart |= bit
            for test, gap in zip(pattern.tests, pattern.gaps):
                self._gaps |= bit if gap else 0
                self._place(test, bit)
                bit <<= 1
            self._gaps |= bit if pattern.gaps[-1] else 0
            self._final[bit.bit_length()] = number
            self._final_modules |= bit if pattern.modules else 0
            self._final_parameters |= bit if pattern.parameters else 0
            bit <<= 1

    def _place(self, test: Names | Indices, bit: int) -> None:
        if isinstance(test, Names):
            for literal in test.literals:
                self._literals[literal] = self._literals.get(literal, 0) | bit
            for glob in test.globs:
                self._globs[glob] = self._globs.get(glob, 0) | bit
            self._anything |= bit if test.anything else 0
        elif test.spans is None:
            self._every |= bit
        else:
            for span in test.spans:
                # An index that counts from the front needs no container to be judged, so a thousand rules about
                # a thousand layers cost one look-up a layer.
                if isinstance(span, int) and span >= 0:
                    self._at[span] = self._at.get(span, 0) | bit
                else:
                    self._spans[span] = self._spans.get(span, 0) | bit

    def step(self, state: int, segment: Segment) -> int:
        accepts = self._accepts.get(segment)
        if accepts is None:
            accepts = self._accepts[segment] = self._accept(segment)
        return ((state & accepts) << 1) | (state & self._gaps)

    def _accept(self, segment: Segment) -> int:
        name, index, length = segment
        accepts = self._anything | self._literals.get(name, 0)
        if index < 0:
            for glob, bits in self._globs.items():
                if bits & ~accepts and glob_regex(glob).fullmatch(name):
                    accepts |= bits
        else:
            accepts |= self._every | self._at.get(index, 0)
            for span, bits in self._spans.items():
                if bits & ~accepts and within(span, index, length):
                    accepts |= bits
        return accepts

    def modules(self, state: int) -> Iterator[int]:
        """The patterns that accept a module in this state, by number."""
        return self._numbers(state & self._final_modules)

    def parameters(self, state: int) -> Iterator[int]:
        """The patterns that accept a parameter in this state."""
        return self._numbers(state & self._final_parameters)

    def _numbers(self, bits: int) -> Iterator[int]:
        while bits:
            low = bits & -bits
            yield self._final[low.bit_length()]
            bits ^= low
