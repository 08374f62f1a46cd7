"""`python tests/fuzz.py SECONDS [SEED]` changes good texts at random and reads them: only `graphpatch.Error` may come out.

A target is a reader and the texts it starts from; another room adds its own to `TARGETS`.
"""

from __future__ import annotations

import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from graphpatch.lang.diagnostics import Error
from graphpatch.lang.formatter import format_rules
from graphpatch.lang.parser import parse_rules
from graphpatch.lang.program import LIBRARY, Program, parse_program
from graphpatch.plan.plan import Plan
from graphpatch.plan.ruleset import RuleSet
from graphpatch.tree.headers import read_headers
from graphpatch.tree.tree import Tree

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


def tree(text: str | bytes) -> None:
    """Whatever was read can be written, and reads back as the same."""
    try:
        read = Tree.from_text(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)
    except Error as error:
        _sound(error)
        raise
    written = read.to_text()
    again = Tree.from_text(written)
    assert again.to_text() == written and again.fingerprint == read.fingerprint, "writing changes the tree"


def headers(text: str | bytes) -> None:
    """A safetensors file whose header is this text (or that is these bytes)."""
    header = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else b""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(text if isinstance(text, bytes) else len(header).to_bytes(8, "little") + header)
        file.flush()
        read = read_headers(file.name)
    assert Tree.from_text(read.to_text()).fingerprint == read.fingerprint, "writing changes the tree"


def rule_set(text: str | bytes) -> None:
    read = RuleSet.from_json(text)
    assert RuleSet.from_json(read.to_json()) == read, "JSON changes the rules"


def plan(text: str | bytes) -> None:
    read = Plan.from_json(text)
    assert Plan.from_json(read.to_json()).id == read.id, "JSON changes the plan"


def _rule_texts() -> list[str]:
    jobs = (HERE / "lang" / "jobs.rules.txt").read_text(encoding="utf-8").split("###")
    wrong = re.findall(r"^>>> (.*)$", (HERE / "lang" / "mistakes.txt").read_text(encoding="utf-8"), re.MULTILINE)
    packaged = [path.read_text(encoding="utf-8") for path in sorted(LIBRARY.rglob("*.rules"))]
    return [*("#" + job for job in jobs[1:]), *packaged, *wrong]


_MODEL = """graphpatch tree 1
source "meta"

classes
  Model = my.Model < torch.nn.modules.module.Module
  List = torch.nn.modules.container.ModuleList < torch.nn.modules.module.Module
  Linear = torch.nn.modules.linear.Linear < torch.nn.modules.module.Module
  Block = my.Block < torch.nn.modules.module.Module

config 0
  hidden_size = 4
  names = ["a", {"b": 1.5}]

modules
  ^: Model; config 0
    embed: Linear in_features=4 out_features=4; param weight float32[4,4]
    "odd name": Linear in_features=4 out_features=4; param weight float32[4,4] frozen; buffer b int64[]
    layers: List
      [0:3]: Block index=@
        q: Linear in_features=4 out_features=4 bias=null; param weight bfloat16[4,4]
        k: Linear in_features=4 out_features=2 t=[1,["x",null,true]] nan=NaN; param weight bfloat16[2,4]
    head: Linear in_features=4 out_features=4; param weight float32[4,4]
      weight = ^embed.weight
    again -> ^layers.1.q

end 14 modules
"""
_HEADER = {
    "__metadata__": {"format": "pt"},
    "model.layers.0.q.weight": {"dtype": "BF16", "shape": [4, 4], "data_offsets": [0, 32]},
    "model.layers.10.q.weight": {"dtype": "F32", "shape": [], "data_offsets": [32, 36]},
    "odd name.\u00e9": {"dtype": "I64", "shape": [0, 3], "data_offsets": [36, 36]},
}
_JSON = '{ } [ ] , : " 0 -1 1e999 NaN null true {} [] "a" "" \\u0000 \\ud800 [[[[ {"a": "kind" "span": "text"'.split()


def _rule_sets() -> list[RuleSet]:
    patches = "param n: int = 2\npatch layers[i in -$n:].{q,k} with lora(rank=$i) expect 4 as x\ntrain layers as y"
    return [RuleSet(parse_program(text)) for text in (patches, "use freeze")]


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
    "tree": Target(
        tree,
        [_MODEL, *(path.read_text(encoding="utf-8") for path in sorted((HERE / "rules" / "trees").glob("*.tree")))],
        [
            *'^ -> = : ; param buffer config length note float32[4,4] [0:3]: @ @1+1 end 13 0 1 99999999999 {} [ ] "'.split(),
            "  ",
            "\n",
        ],
    ),
    "headers": Target(headers, [json.dumps(_HEADER)], [*_JSON, '"shape": [1]', '"dtype": "F4"', ".0.", "..", "."]),
    "rule_set": Target(rule_set, [one.to_json() for one in _rule_sets()], _JSON),
    "plan": Target(
        plan,
        [one.plan(Tree.from_text(_MODEL)).to_json() for one in _rule_sets()],
        [*_JSON, '"changes"', '"tree"', "layers[0:3]"],
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
