"""Writes what is made from the source: docs/ops/*.md, diagnostics.md, the grammar in language.md, the README's output.

Run by `make docs`; a test fails where a page is not what this would write.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from itertools import pairwise
from pathlib import Path

from graphpatch.cli.main import main as graphpatch
from graphpatch.cli.op_facts import OpFacts, op_facts
from graphpatch.ops.registry import find, names

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "graphpatch"
README = DOCS.parent / "README.md"
_CODE = re.compile(r"GP\d{3}")
_FAMILIES = {
    "1": "The text is no rule file",
    "2": "A name, an argument or a type is wrong",
    "3": "Style; never changes the exit code",
    "4": "The rules do not fit the model",
    "5": "The model cannot be changed, or changed back",
    "6": "An adapter cannot be written, read or loaded",
    "7": "The command line: what was asked for cannot be tried",
    "8": "Under Lightning, something would go wrong in silence",
    "9": "megatron-core: a model whose layers are sharded over ranks",
}
_MEANINGS = {
    "GP100": "the file is too large, or no text in UTF-8",
    "GP122": "this regex is refused: it could take forever on some names",
    "GP123": "this regex does not compile",
    "GP201": "no op is called `…`",
    "GP203": "`…` has no argument `…`",
    "GP204": "an argument has a value that the op does not take, or one is missing",
    "GP205": "`…` takes a value of another type",
    "GP220": "an expression has no value here",
    "GP229": "an expression that needs no model has no value",
    "GP404": "an index is out of range",
    "GP410": "an op refuses a target, and says why",
    "GP424": "an op changes a weight that another module shares, and would change one use of it alone",
    "GP465": "the model caps its attention scores itself",
    "GP466": "the model has a window itself, beyond which its mask says nothing",
    "GP483": "a module has no input that an op could stand before",
    "GP550": "the target is no attention that can be changed",
    "GP551": "the attention backend cannot do what is asked for",
    "GP662": "weights of a checkpoint have another shape than the model's, its maps carried out",
    "GP952": "no rules on a megatron-core model say what its weights are called in a Hugging Face checkpoint",
    "GP950": "attention of Transformer Engine, which no rule can change",
    "GP951": "megatron-core's config scales or shards in a way that would combine wrongly with a rule",
    "GP664": "a weight that is tied in the model has two values in a checkpoint",
    "GP663": "reading a checkpoint failed half-way",
    "GP660": "what `using` names does not exist, or does not fit what it is given",
    "GP442": "the target of `rope.scale` is no rotary embedding",
    "GP468": "a module in the place of a parallel one would save its shards as the whole",
    "GP467": "a model of megatron-core does not give its output layer the last hidden states alone",
    "GP564": "the target of `rope.scale` has positions that it cannot stretch, or not so",
    "GP443": "the target checkpoints itself",
    "GP555": "the target of `qk_norm` projects by no `q_proj` and `k_proj`",
    "GP580": "`layers.drop` names a layer that is not there, or all of them",
    "GP581": "`layers.repeat` names a layer that is not there, or would change nothing, or copy what was patched",
    "GP583": "`compile` is given a backend that there is not, or a mode that the backend has not",
    "GP480": "the embedding cannot gain rows as asked: fewer tokens than it has, say",
    "GP481": "an output layer over the vocabulary is not said, or said wrongly, where an embedding is resized",
    "GP482": "something that has to do with an embedding's rows would not follow where it is resized",
    "GP560": "the target of `norm.replace` is no norm of this kind",
    "GP561": "the epsilon of a norm is not to be found",
    "GP562": "the model caps its logits itself",
    "GP563": "the target of `activation` holds no activation as a function",
    "GP545": "the model has no adapter of this name",
    "GP525": "an argument of `combine` is wrong, or has no effect with this method",
    "GP547": "adapters cannot be chosen for each sample: a module cannot tell the samples of a batch apart",
    "GP456": "a parameter is no stack of experts whose use `lora` knows",
    "GP458": "an argument asks for one adapter of a tied weight, and the weight is no other's",
    "GP459": "`parts` of a linear: whose rows are whose is not known, or is said wrongly",
    "GP461": "a weight that cannot be quantised: it has not two dimensions",
    "GP462": "a weight that is quantised already",
    "GP463": "blocks do not divide the rows of a weight that is to be quantised",
    "GP542": "a weight on the meta device has no values to quantise",
    "GP503": "the target's forward is never called, so a change there would do nothing",
    "GP631": "there is no adapter, or none that a reader could open",
    "GP641": "the files of the base cannot be read",
    "GP644": "an adapter cannot be merged into a checkpoint, since it does something else than change weights",
    "GP645": "the model of a checkpoint has to be known, and transformers is not there or does not know it",
    "GP633": "a reader refuses the adapter, or misreads it",
    "GP447": "a head cannot tell which hidden states of a model with an encoder and a decoder to read",
    "GP448": "a head's target is neither a model nor its output layer",
    "GP449": "how wide a model's hidden states are is not said",
    "GP450": "a model has no pooler",
    "GP451": "one module would carry an op twice, for two targets",
    "GP570": "the target is not the model's output layer",
    "GP575": "the model was built without a pooler",
}
"""For codes whose titles are put together elsewhere."""


def pages() -> dict[Path, str]:
    """Every generated page, by its path."""
    built_in = [op for op in map(find, names()) if op is not None and op.__module__.startswith("graphpatch.")]
    facts = [op_facts(op) for op in built_in]
    found = {DOCS / "ops" / f"{one.name}.md": op_page(one) for one in facts}
    found[DOCS / "ops" / "README.md"] = ops_index(facts)
    found[DOCS / "diagnostics.md"] = diagnostics_page()
    language = DOCS / "language.md"
    found[language] = with_grammar(language.read_text(encoding="utf-8"))
    found[README] = with_output(README.read_text(encoding="utf-8"))
    return found


# ── ops ──


def op_page(facts: OpFacts) -> str:
    lines = [f"# {facts.name}", "", facts.summary]
    for paragraph in facts.paragraphs:
        lines += ["", paragraph]
    lines += ["", "```", facts.usage(), "```", ""]
    if facts.arguments:
        lines += ["| argument | value | default | |", "|---|---|---|---|"]
        for a in facts.arguments:
            default = "required" if a.default is None else f"`{a.default}`"
            lines.append(f"| `{a.name}` | {_cell(a.kind)} | {default} | {_cell(a.about)} |")
        lines.append("")
    if facts.open:
        lines += ["Any other argument is taken too, by its name.", ""]
    lines += ["| accepts | rewritten by |", "|---|---|"]
    lines += [f"| {'any module' if c == '*' else f'`{c}`'} | `{rewrite}` |" for c, rewrite in facts.accepts]
    lines += ["", *facts.traits]
    return "\n".join(lines) + "\n" + _GENERATED.format("the op's model and docstring")


def ops_index(facts: list[OpFacts]) -> str:
    lines = ["# Ops", "", "What a rule can say behind `with`. `graphpatch ops NAME` shows the same.", ""]
    lines += ["| op | |", "|---|---|"]
    lines += [f"| [{one.name}]({one.name}.md) | {_cell(one.summary)} |" for one in facts]
    return "\n".join(lines) + "\n" + _GENERATED.format("the registered ops")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


_GENERATED = "\n<!-- Made by docs/generate.py from {}; do not edit. -->\n"


# ── diagnostics ──


def diagnostics_page() -> str:
    titles: dict[str, dict[str, None]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for code, title in codes_of(path.read_text(encoding="utf-8")):
            titles.setdefault(code, {})
            if title:
                titles[code][title] = None
    lines = [
        "# Diagnostics",
        "",
        "Every finding has a code, says where and what, and how to mend it. `…` stands for what a message fills in.",
        "In Python they are `graphpatch.Error.diagnostics`; `graphpatch check --json` prints them as data.",
    ]
    for family, about in _FAMILIES.items():
        codes = sorted(code for code in titles if code[2] == family)
        if codes:
            lines += ["", f"## GP{family}xx: {about}", "", "| code | says |", "|---|---|"]
            lines += [f"| {code} | {_cell(_MEANINGS.get(code) or '<br>'.join(titles[code]))} |" for code in codes]
    return "\n".join(lines) + "\n" + _GENERATED.format("the calls that make them")


def codes_of(source: str) -> Iterator[tuple[str, str]]:
    """Every code in a module, with the title that stands behind it where one does."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _CODE.fullmatch(node.value):
            yield node.value, ""
        if isinstance(node, (ast.Call, ast.Tuple)):
            parts = node.args if isinstance(node, ast.Call) else node.elts
            for first, behind in pairwise(parts):
                if isinstance(first, ast.Constant) and isinstance(first.value, str) and _CODE.fullmatch(first.value):
                    yield first.value, _title(behind)


def _title(node: ast.expr) -> str:
    """The text of a string or f-string, `…` for what is filled in; empty where nothing of it is fixed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.IfExp):
        return _title(node.body)
    if isinstance(node, ast.BinOp):
        return _title(node.left) + _title(node.right)
    if isinstance(node, ast.JoinedStr):
        parts = [str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values]
        return "".join(parts) if any(p != "…" for p in parts) else ""
    return ""


# ── the grammar ──


def with_grammar(page: str) -> str:
    """The page with the grammar as it stands now, between its markers."""
    grammar = (PACKAGE / "lang" / "rules.lark").read_text(encoding="utf-8")
    rules = grammar[grammar.index("start:") : grammar.index("// ── Words")].strip()
    block = f"<!-- grammar -->\n```lark\n{rules}\n```\n<!-- end of grammar -->"
    return re.sub(r"<!-- grammar -->.*<!-- end of grammar -->", lambda _: block, page, flags=re.DOTALL)


# ── what the README's commands print ──

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TYPO = "patch layers[*].self_attn.{q,k,w}_proj with lora(rank=16)\n"


def with_output(page: str) -> str:
    """The page with the output of its commands, run where its rule file and the config of a Llama of 8 B lie."""
    rules = re.search(r"^```rules\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert rules is not None
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            Path("llama").mkdir()
            Path("llama/config.json").write_text(json.dumps(LLAMA_8B))
            Path("lora.rules").write_text(rules[1])
            Path("typo.rules").write_text(TYPO)
            command = re.compile(r"^```console\n\$ graphpatch (.*?)\n.*?^```$", re.MULTILINE | re.DOTALL)
            return command.sub(lambda found: f"```console\n$ graphpatch {found[1]}\n{_printed(found[1])}```", page)
        finally:
            os.chdir(here)


def _printed(command: str) -> str:
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        graphpatch(command.split())
    return output.getvalue()


def main() -> None:
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(DOCS.parent))


if __name__ == "__main__":
    main()
