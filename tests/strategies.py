"""Random rules: syntax as a notebook could build it, of every kind that can be written in a file."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from graphpatch.lang import syntax as s

_ODD = {"true", "false", "none", "null", "nil"}
WORDS = st.sampled_from(
    "a b q_proj layers rank x1 _ with_ in_features patchwork eps Linear self_attn h è configs".split()
) | st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,6}", fullmatch=True)
names = WORDS.filter(lambda w: w.isascii() and w not in s.KEYWORDS and w.lower() not in _ODD)
dotted = st.lists(names, min_size=1, max_size=3).map(".".join)
arg_names = st.none() | names | st.sampled_from(["in", "if", "with", "rank"])

texts = st.text(st.characters(blacklist_categories=["Cs"]), max_size=8) | st.sampled_from(
    ['"', "'", "\\", 'a"b', "\\n", "\n", "#", "$x", "a\tb", "\0", "\u2028", "\x85", "ünï"]
)
numbers = (
    st.integers(-(2**63) + 1, 2**63 - 1)
    | st.integers(-3, 40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([0.05, -0.0, 1e-05, 1e22, 5e-324, 1.7976931348623157e308])
)
literals = st.builds(s.Literal_, value=numbers | texts | st.booleans() | st.none())
variables = st.builds(s.Var, name=names)


def _arithmetic(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    many = st.lists(inner, min_size=2, max_size=3).map(tuple)
    comparison = st.builds(
        s.Comparison,
        op=st.sampled_from(["<", "<=", ">", ">=", "==", "!=", "in", "not in", "is", "is not"]),
        right=inner,
    )
    args = st.lists(st.builds(s.Arg, name=arg_names, value=inner), max_size=3).map(well_named)
    return (
        st.builds(s.ListExpr, items=st.lists(inner, max_size=3).map(tuple))
        | st.builds(s.Unary, op=st.sampled_from(["-", "+", "not"]), operand=inner)
        | st.builds(s.Binary, op=st.sampled_from(["+", "-", "*", "/", "//", "%", "**"]), left=inner, right=inner)
        | st.builds(s.BoolOp, op=st.sampled_from(["and", "or"]), operands=many)
        | st.builds(s.Compare, left=inner, links=st.lists(comparison, min_size=1, max_size=2).map(tuple))
        | st.builds(s.IfElse, then=inner, test=inner, otherwise=inner)
        | st.builds(s.Item, value=inner, index=inner)
        | st.builds(s.Call, name=dotted | st.sampled_from(["sqrt", "min", "len"]), args=args)
    )


def well_named(args: list[s.Arg]) -> tuple[s.Arg, ...]:
    """Positional arguments first, no name twice."""
    named = {arg.name: arg for arg in args if arg.name is not None}
    return (*(arg for arg in args if arg.name is None), *named.values())


_simple = st.recursive(literals | variables | st.builds(s.Name, name=dotted), _arithmetic, max_leaves=8)

# ── selectors ──

_bounds = st.integers(-20, 40).map(lambda n: s.Literal_(value=n)) | variables | _simple
_no_zero = _bounds.filter(lambda b: not (isinstance(b, s.Literal_) and b.value == 0))
spans = (
    st.just(s.Every())
    | st.builds(s.At, at=_bounds)
    | st.builds(s.Range, start=st.none() | _bounds, stop=st.none() | _bounds, step=st.none() | _no_zero)
)
_span_lists = st.lists(spans, min_size=1, max_size=3).map(tuple)
indices = st.builds(s.Index, capture=st.none() | names, spans=_span_lists)

_plain = st.sampled_from("q_proj layers mlp 0 12 with patch none true up_proj ö in a?".split()) | names
_braces = st.lists(_plain | st.sampled_from(["*_x", "q*"]), min_size=1, max_size=3).map(
    lambda ws: "{" + ",".join(ws) + "}"
)
_globs = (
    _plain
    | st.sampled_from(["*", "**", "*_proj", "q?", "a*b"])
    | st.builds("{}{}{}".format, st.just("") | _plain, _braces, st.just("") | _plain)
)
_odd_names = texts.filter(lambda t: t != "" and "." not in t and "*" not in t) | st.sampled_from(
    ["to q", "down-0", "none"]
)
steps = (
    st.builds(s.Step, kind=st.just("glob"), name=_globs, index=st.none() | indices)
    | st.builds(s.Step, kind=st.just("quoted"), name=_odd_names, index=st.none() | indices)
    | st.builds(s.Step, kind=st.just("role"), name=names | st.just("new"), index=st.none() | indices)
)
classes = st.sampled_from(
    ["Linear", "*RMSNorm", "=Linear", "{Linear,Conv1D}", "={A,B}", "torch.nn.Linear", "*Norm?d", "with"]
)
paths = st.builds(
    s.PathSelector,
    anchored=st.booleans(),
    steps=st.lists(steps, min_size=1, max_size=4).map(tuple),
    cls=st.none() | classes,
)
roots = st.builds(s.PathSelector, anchored=st.just(True), cls=st.none() | classes)
by_class = st.builds(s.PathSelector, cls=classes)
regexes = st.builds(
    s.RegexSelector,
    pattern=st.sampled_from([r"model\.layers\.\d+\.mlp\..*", "a/b", r"(?:\w+\.)*q_proj", "a", r"\\", "#", r"[/]"]),
    cls=st.none() | classes,
)
selectors = paths | paths | roots | by_class | regexes
unions = st.builds(s.SelectorUnion, branches=st.lists(selectors, min_size=1, max_size=3).map(tuple))

queries = st.builds(s.Query, function=st.sampled_from(["has", "count"]), selector=unions)
expressions = st.recursive(literals | variables | st.builds(s.Name, name=dotted) | queries, _arithmetic, max_leaves=12)

# ── statements ──

args = st.lists(st.builds(s.Arg, name=arg_names, value=expressions), max_size=3).map(well_named)
ops = st.builds(s.OpCall, name=dotted | st.sampled_from(["lora", "scale.output"]), args=args)
expects = st.just(s.Expect(any=True)) | st.builds(
    s.Expect,
    cmp=st.sampled_from(["==", "!=", "<", "<=", ">", ">="]),
    count=expressions,
    per=st.none() | selectors,
)
uses = st.builds(
    s.Use,
    target=dotted,
    args=st.lists(st.builds(s.Arg, name=names, value=expressions), max_size=2).map(well_named),
) | st.builds(s.Use, target=texts, by_path=st.just(True))
params = st.builds(
    s.Param,
    name=names,
    type=st.none() | st.sampled_from(["int", "float", "bool", "str", "list"]),
    default=st.none() | expressions,
)
aliases = st.builds(s.Alias, name=names.filter(lambda n: n != "new"), selector=unions)
requires = st.builds(s.Require, test=expressions)
patches = st.builds(
    s.Patch,
    selector=unions,
    ops=st.lists(ops, min_size=1, max_size=2).map(tuple),
    where=st.none() | expressions,
    except_=st.none() | unions,
    expect=st.none() | expects,
    label=st.none() | names,
    overrides=st.lists(names, max_size=2).map(tuple),
)


@st.composite
def freezes(draw: Any) -> s.Freeze:
    trainable = draw(st.booleans())
    return s.Freeze(
        trainable=trainable,
        selector=draw(unions),
        where=draw(st.none() | expressions),
        except_=draw(st.none() | unions),
        expect=draw(st.none() | expects),
        label=draw(st.none() | names) if trainable else None,
    )


_keys = st.builds(s.KeyStep, name=_globs, index=st.none() | indices | st.builds(s.Index, capture=names)) | st.builds(
    s.KeyStep, name=_odd_names, quoted=st.just(True)
)
_new_keys = st.builds(s.KeyStep, name=_globs.filter(lambda g: g != "none"), at=st.none() | expressions) | st.builds(
    s.KeyStep, name=_odd_names, quoted=st.just(True), at=st.none() | expressions
)


@st.composite
def maps(draw: Any) -> s.Map:
    target = draw(st.none() | st.lists(_new_keys, min_size=1, max_size=3).map(tuple))
    source = draw(st.lists(_keys, min_size=1, max_size=3).map(tuple))
    return s.Map(source=source, target=target, using=draw(st.none() | ops) if target is not None else None)


conditional = st.recursive(
    patches | freezes() | maps() | requires,
    lambda inner: st.builds(s.When, test=expressions, body=st.lists(inner, max_size=3).map(tuple)),
    max_leaves=4,
)
statements = uses | params | aliases | conditional
files = st.builds(s.RuleFile, statements=st.lists(statements, max_size=4).map(tuple))
