"""`python tests/fuzz.py SECONDS [SEED]` changes good texts at random and reads them: only `graphpatch.Error` may come out.

A target is a reader and the texts it starts from; another room adds its own to `TARGETS`.
"""

from __future__ import annotations

import random
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from graphpatch.lang.diagnostics import Error
from graphpatch.lang.formatter import format_rules
from graphpatch.lang.parser import parse_rules
from graphpatch.lang.program import LIBRARY, Program, parse_program

HERE = Path(__file__).parent
SLOWEST = 5.0
"""Seconds that one text may take."""


class Target(NamedTuple):
    read: Callable[[str | bytes], Any]
    texts: list[str]
    words: list[str]
    """What may be put anywhere."""


def rules(text: str | bytes) -> None:
    """Parse, resolve, format and parse again: whatever was read can be written, and means the same."""
    try:
        parsed = parse_rules(text)
    except Error as error:
        _sound(error)
        raise
    assert parse_rules(format_rules(parsed)) == parsed, "format changes the meaning"
    try:
        program = parse_program(text, complete=False)
    except Error as error:
        _sound(error)
        raise
    assert Program.from_json(program.model_dump_json()) == program, "JSON changes the program"


def _sound(error: Error) -> None:
    """A message that can be shown: a code, a sentence, places that lie in their text."""
    assert str(error) and error.diagnostics
    for finding in error.diagnostics:
        assert re.fullmatch(r"GP\d{3}", finding.code) and finding.title, finding
        assert not re.search(r"\b(VBAR|LPAR|SEGMENT|__ANON_\d|\$END)\b", str(error)), error
        for place in finding.places:
            assert 1 <= place.span.line <= place.source.text.count("\n") + 1, finding
            assert (place.span.line, place.span.column) <= (place.span.end_line, place.span.end_column), finding


def _rule_texts() -> list[str]:
    jobs = (HERE / "lang" / "jobs.rules.txt").read_text(encoding="utf-8").split("###")
    wrong = re.findall(r"^>>> (.*)$", (HERE / "lang" / "mistakes.txt").read_text(encoding="utf-8"), re.MULTILINE)
    packaged = [path.read_text(encoding="utf-8") for path in sorted(LIBRARY.rglob("*.rules"))]
    return [*("#" + job for job in jobs[1:]), *packaged, *wrong]


TARGETS: dict[str, Target] = {
    "rules": Target(
        rules,
        _rule_texts(),
        [
            *"""use param alias require when patch freeze train map with then where except expect any per as overrides using and or\n        not in is if else true false none has( count( ( ) [ ] { } | . , : = == != < > + - * ** / // % ^ @ $ \" ' # \\ ; -> && || !\n        0 1 -1 1e999 0.5 99999999999999999999 [i in *] [0:3] [::-1] @qkv $i config.x q_proj {a,b} /a.*/ \ufeff \x00 \r\n é \u2028\n        (a+)+ True None layers[*] lora(rank=16) """.split(),
            "\n",
            " ",
            "\t",
            "\x00",
            "�",
        ],
    ),
}


def mutate(text: str, target: Target, chance: random.Random) -> str | bytes:
    for _ in range(chance.choice([1, 1, 1, 2, 3, 8])):
        at = chance.randrange(len(text) + 1)
        to = min(len(text), at + chance.choice([0, 1, 1, 2, 5, 20, 200]))
        kind = chance.randrange(7)
        if kind == 0:
            text = text[:at] + text[to:]
        elif kind == 1:
            text = text[:at] + chance.choice(target.words) + text[at:]
        elif kind == 2:
            text = text[:at] + chance.choice(target.words) + text[to:]
        elif kind == 3:
            text = text[:to] + text[at:to] * chance.choice([1, 2, 30]) + text[to:]
        elif kind == 4:
            other = chance.choice(target.texts)
            start = chance.randrange(len(other) + 1)
            text = text[:at] + other[start : start + chance.choice([5, 50, 500])] + text[to:]
        elif kind == 5:
            text = text[:at]
        else:
            text = text[:at] + chr(chance.choice([chance.randrange(32, 127), chance.randrange(0x2FFF)])) + text[to:]
        text = text[:20_000]
    if chance.random() < 0.05:
        data = bytearray(text.encode("utf-8", "surrogatepass"))
        if data:
            data[chance.randrange(len(data))] = chance.randrange(256)
        return bytes(data)
    return text


def attempt(target: Target, text: str | bytes) -> str:
    """Read one text; what goes wrong is an exception."""
    start = time.process_time()
    try:
        target.read(text)
        outcome = "read"
    except Error:
        outcome = "refused"
    took = time.process_time() - start
    if took > SLOWEST:
        raise AssertionError(f"{took:.1f} s")
    return outcome


def run(name: str, seconds: float, seed: int) -> dict[str, int]:
    target, chance = TARGETS[name], random.Random(seed)
    counts = {"read": 0, "refused": 0}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        text = mutate(chance.choice(target.texts), target, chance)
        try:
            counts[attempt(target, text)] += 1
        except Exception:
            print(f"{name}, seed {seed}, on\n{text!r}", file=sys.stderr)
            raise
    return counts


if __name__ == "__main__":
    duration = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    for each in TARGETS:
        print(f"{each}: {run(each, duration / len(TARGETS), first)}")
