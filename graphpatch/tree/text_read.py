"""The text form read back: lines become templates, which `text_unfold` makes nodes of."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from ..lang.diagnostics import Diagnostic, Error, Place, Source, Span
from .compile import compile_selector
from .match import match
from .text_unfold import WORD, Reference, Template, Unfolding
from .text_write import FIRST_LINE, LEVELS
from .tree import Mark, Signature, Tensor, Tree

_KEY = re.compile(rf"( *)(?:(\^)|\[([0-9:,]+)\]|({WORD}))(:| -> | = )")
_CLASS = re.compile(rf" ({WORD})(?![\w#=])")
_ATTRIBUTE = re.compile(rf" ({WORD})=(?:@(\d?)(?:\+(\d))?(?= |;|$))?")
_TENSOR = re.compile(rf"; (param|buffer) ({WORD}) ({WORD})\[((?:\d{{1,18}}(?:,\d{{1,18}})*)?)\]( frozen| trainable)?")
_NUMBER = re.compile(r"; (config|length) (\d{1,9})")
_NOTE = re.compile(r"; note (?=\")")
_SPAN = re.compile(r"(\d{1,9})(?::(\d{1,9})(?::(\d{1,9}))?)?")
_CONFIG_LINE = re.compile(rf"  ({WORD}) = ")
_CLASS_LINE = re.compile(rf"  ({WORD}) = (.*)")
_QUALIFIED = re.compile(r'[\w.<>]+|"(?:[^"\\]|\\.)*"')
_decode = json.JSONDecoder().raw_decode


def parse(text: str, name: str) -> Tree:
    """Raises `Error`: GP431 no tree, GP432 another version, GP433 a wrong line, GP434 too large, GP435 cut off."""
    return _Reader(Source(name, text.replace("\r\n", "\n"))).tree()


class _Reader:
    def __init__(self, source: Source):
        self.source = source
        self.lines = source.text.split("\n")
        self.classes: dict[str, tuple[str, ...]] = {}
        self.result = Tree([], [], [], [], [], [], [])
        self.heads: dict[str, Template] = {}
        self.templates: list[Template] = []
        self.open: list[Template] = []
        """The module of the last line, and those it stands in."""

    # ── the file ──
    def tree(self) -> Tree:
        first = self.lines[0].strip()
        if first != FIRST_LINE:
            if re.fullmatch(r"graphpatch tree \S+", first):
                self.fail(
                    "GP432", "this .tree file has another format version", 1, f"this graphpatch reads `{FIRST_LINE}`"
                )
            self.fail(
                "GP431",
                "this is not a .tree file",
                1,
                f"one starts with `{FIRST_LINE}`; `graphpatch tree --model M` writes one",
            )
        marks, count = self._sections()
        if not self.templates:
            self.fail("GP433", "this tree has no modules", 1)
        Unfolding(self.result, self.fail, self._word).run(self.templates)
        if count != len(self.result):
            self.fail(
                "GP435", f"the tree has {len(self.result)} modules, and its last line says {count}", len(self.lines),
                "lines are missing, or the file was edited: then mend the last line",
            )  # fmt: skip
        self._read_marks(marks)
        return self.result

    def _sections(self) -> tuple[list[int], int]:
        """Read all lines; returns those of the marks, and how many modules the last line counts."""
        marks: list[int] = []
        section, number = "", 1
        for number, line in enumerate(self.lines[1:], 2):
            if not line.strip():
                continue
            if line[0] != " ":
                section, _, rest = line.partition(" ")
                if section == "end":
                    return marks, self._end(rest, number)
                self._heading(section, rest, number)
            elif section == "modules":
                self._module(line, number)
            elif section == "classes":
                self._class(line, number)
            elif section == "config":
                found = _CONFIG_LINE.match(line)
                if not found:
                    self.fail("GP433", "a line of a config reads `key = JSON`", number)
                self.result.configs[-1][self._word(found[1], number)] = self._value(line, found.end(), number)
            elif section == "marks":
                marks.append(number)
            else:
                self.fail("GP433", "this line stands under no heading", number)
        self.fail("GP435", "this .tree file was cut off: its last line should be `end N modules`", max(1, number - 1))

    def _end(self, rest: str, number: int) -> int:
        count = re.fullmatch(r"(\d{1,9}) modules\s*", rest)
        if not count:
            self.fail("GP433", "the last line reads `end N modules`", number)
        left = next((at for at, line in enumerate(self.lines[number:], number + 1) if line.strip()), None)
        if left is not None:
            self.fail("GP433", "there is text behind the last line", left)
        for template in self.templates:
            if template.facts.config >= len(self.result.configs):
                self.fail("GP433", f"there is no config {template.facts.config}", template.line)
        return int(count[1])

    def _heading(self, section: str, rest: str, number: int) -> None:
        if section == "source":
            self.result.source = self._expect(str, rest, number)
        elif section == "wrappers":
            wrappers = self._expect(list, rest, number)
            if not all(isinstance(w, str) for w in wrappers):
                self.fail("GP433", "wrappers are names", number)
            self.result.wrappers = wrappers
        elif section == "config":
            if rest.strip() != str(len(self.result.configs)):
                self.fail("GP433", f"the next config is number {len(self.result.configs)}", number)
            self.result.configs.append({})
        elif section not in ("classes", "modules", "marks") or rest.strip():
            self.fail("GP433", "a heading is one of source, wrappers, classes, modules, config N, marks, end", number)

    def _expect(self, kind: type, text: str, number: int) -> Any:
        value = self._value(text, 0, number)
        if not isinstance(value, kind):
            self.fail("GP433", f"this should be a {'text' if kind is str else 'list'}, as JSON", number)
        return value

    def _class(self, line: str, number: int) -> None:
        found = _CLASS_LINE.fullmatch(line)
        names = re.split(r" < ", found[2].strip()) if found else []
        if not found or not all(_QUALIFIED.fullmatch(name) for name in names):
            self.fail("GP433", "a class reads `Name = package.Name < package.Base < ...`", number)
        self.classes[self._word(found[1], number)] = tuple(
            self._word(name, number) if name.startswith('"') else name for name in names
        )

    # ── one module ──
    def _module(self, line: str, number: int) -> None:
        key = _KEY.match(line)
        if not key:
            self.fail("GP433", "a module reads `name: Class attribute=value; param name dtype[shape]`", number)
        depth, odd = divmod(len(key[1]), 2)
        path = self.open
        if odd or depth < 1 or depth > len(path) + 1:
            self.fail("GP433", "a module stands two spaces inside the one it belongs to", number)
        del path[depth - 1 :]
        if (key[2] is not None) != (depth == 1):
            self.fail("GP433", "the root, and nothing else, is `^`", number)
        if key[5] != ":":
            self._link(line, key, number)
            return
        template = self._head(line[key.end() :], key.end(), number)
        template.line, template.depth = number, depth
        template.indices, template.name = (), None
        if key[3] is not None:
            template.indices = self._indices(key[3], number)
        else:
            template.name = self._word(key[4], number) if key[4] else ""
        if path:
            path[-1].below.append(template)
        elif self.templates:
            self.fail("GP433", "a tree has one root", number)
        path.append(template)
        self.templates.append(template)

    def _link(self, line: str, key: re.Match[str], number: int) -> None:
        if not self.open or key[4] is None:
            self.fail("GP433", "this line belongs to no module", number)
        links = self.open[-1].edges if key[5] == " -> " else self.open[-1].ties
        links.append((self._word(key[4], number), line[key.end() :], number))

    def _head(self, text: str, start: int, number: int) -> Template:
        """Class, attributes, tensors and the rest; the same text is the same template but for its place."""
        known = self.heads.get(text)
        if known is None:
            known = self.heads[text] = self._parse_head(text, start, number)
        return Template(number, 0, None, facts=known.facts, references=known.references, length=known.length)

    def _parse_head(self, text: str, start: int, number: int) -> Template:
        at = 0
        mro: tuple[str, ...] = ()
        found = _CLASS.match(text)
        if found:
            name = self._word(found[1], number)
            if name not in self.classes:
                self.fail("GP433", f"the class `{name}` is not among the classes above", number)
            mro, at = self.classes[name], found.end()
        attributes: dict[str, Any] = {}
        references: dict[str, Reference] = {}
        while found := _ATTRIBUTE.match(text, at):
            name = self._word(found[1], number)
            if name in attributes:
                self.fail("GP433", f"`{name}` stands there twice", number)
            if found[2] is not None:
                references[name] = Reference(int(found[2] or 0), int(found[3] or 0))
                if references[name].level not in LEVELS:
                    self.fail("GP433", f"`@{references[name].level}` is too far up", number)
                attributes[name], at = 0, found.end()
            else:
                value, at = self._decode(text, found.end(), number)
                attributes[name] = self._attribute(value, number)
        tensors: dict[str, dict[str, Tensor]] = {"param": {}, "buffer": {}}
        numbers, notes = {"config": -1, "length": 0}, set()
        while at < len(text):
            if found := _TENSOR.match(text, at):
                kind, name = found[1], self._word(found[2], number)
                if name in tensors[kind]:
                    self.fail("GP433", f"`{name}` stands there twice", number)
                shape = tuple(map(int, found[4].split(","))) if found[4] else ()
                trainable = found[5] != " frozen" if kind == "param" else found[5] == " trainable"
                tensors[kind][name] = Tensor(shape, self._word(found[3], number), trainable)
                at = found.end()
            elif found := _NUMBER.match(text, at):
                numbers[found[1]], at = int(found[2]), found.end()
            elif found := _NOTE.match(text, at):
                note, at = self._decode(text, found.end(), number)
                notes.add(note)
            elif not text[at:].strip():
                break
            else:
                self.fail("GP433", "this cannot be read", number, column=start + at + 1)
        facts = Signature(mro, attributes, tensors["param"], tensors["buffer"], numbers["config"], frozenset(notes))
        return Template(number, 0, None, facts=facts, references=references, length=numbers["length"])

    def _attribute(self, value: Any, number: int) -> Any:
        if isinstance(value, list):
            return tuple([self._attribute(item, number) for item in value])
        if isinstance(value, dict):
            self.fail("GP433", "an attribute is a number, a text, true, false, null or a list of those", number)
        return value

    def _indices(self, text: str, number: int) -> list[range]:
        ranges = []
        for part in text.split(","):
            found = _SPAN.fullmatch(part)
            if not found or found[3] == "0":
                self.fail("GP433", f"`[{text[:80]}]` is no list of indices", number)
            first = int(found[1])
            ranges.append(range(first, int(found[2]) if found[2] else first + 1, int(found[3] or 1)))
        if not any(ranges):
            self.fail("GP433", f"`[{text[:80]}]` stands for nothing", number)
        return ranges

    # ── marks ──
    def _read_marks(self, lines: Iterable[int]) -> None:
        from ..lang.parser import parse_selector

        for number in lines:
            line = self.lines[number - 1]
            said, end = self._decode(line, 2, number)
            try:
                marks = tuple(Mark(m["patch"], m["rule"], m["op"], frozenset(m["slots"]), m["exclusive"]) for m in said)
                union = parse_selector(line[end:].strip(), self.source.name)
                (hits,) = match(self.result, [compile_selector(union, _NoScope())])
            except (TypeError, KeyError, Error):
                self.fail("GP433", "a mark reads `[{...}] SELECTOR`", number)
            self.result.marks.update(dict.fromkeys(hits.nodes, marks))
        self.result.marks = dict(sorted(self.result.marks.items()))

    # ── words and values ──
    def _word(self, text: str, number: int) -> str:
        return self._decode(text, 0, number)[0] if text.startswith('"') else text

    def _value(self, text: str, at: int, number: int) -> Any:
        value, end = self._decode(text, at, number)
        if text[end:].strip():
            self.fail("GP433", "there is something behind the value", number, column=end + 1)
        return value

    def _decode(self, text: str, at: int, number: int) -> tuple[Any, int]:
        try:
            return _decode(text, at)
        except (ValueError, RecursionError):
            self.fail("GP433", "this value is not JSON", number, column=at + 1)

    def fail(self, code: str, title: str, number: int, label: str = "", column: int | None = None) -> NoReturn:
        line = self.source.line(number)
        start = column if column is not None else len(line) - len(line.lstrip()) + 1
        place = Place(self.source, Span(number, start, number, max(start + 1, len(line) + 1)), label)
        raise Error(Diagnostic(code, title, (place,)))


class _NoScope:
    """Marks stand at plain paths: no roles, and literal indices only."""

    def alias(self, name: str, span: Span | None) -> NoReturn:
        raise Error(Diagnostic("GP433", f"a mark cannot stand at a role: `@{name}`"))

    def integer(self, bound: Any) -> int:
        value = getattr(bound, "value", None)
        if type(value) is not int:
            raise Error(Diagnostic("GP433", "an index of a mark is a number"))
        return value

    def fail(
        self, code: str, title: str, span: Span | None = None, label: str = "", fixes: tuple[str, ...] = ()
    ) -> NoReturn:
        raise Error(Diagnostic(code, title))
