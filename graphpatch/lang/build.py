"""From lark's tree to the syntax, with the checks that need no more than one statement."""

from __future__ import annotations

import re
from typing import Any

from lark import Token, Tree

from . import syntax as s
from .build_expressions import ExpressionBuilder, Parsed, make, position_in, span_of
from .diagnostics import Place, Span, did_you_mean
from .regex import problem


class Builder(ExpressionBuilder):
    """Builds statements and selectors from trees."""

    # ── statements ──

    def start(self, tree: Parsed) -> s.RuleFile:
        return make(s.RuleFile, statements=tuple(self.statement(t) for t in tree.children), span=span_of(tree))

    def statement(self, tree: Parsed) -> Any:
        return getattr(self, tree.data)(tree)

    def use(self, tree: Parsed) -> s.Use:
        target, args = tree.children
        by_path = target.type == "STRING"
        given = self.args(args)
        for arg in given:
            if arg.name is None:
                self.fail("GP128", "a param is given by its name", arg.span, "write name=value")
        return make(
            s.Use,
            target=self.text(target) if by_path else str(target),
            by_path=by_path,
            args=given,
            span=span_of(tree),
            target_span=span_of(target),
        )

    def param(self, tree: Parsed) -> s.Param:
        name, kind, default = tree.children
        if kind is not None and kind not in ("int", "float", "bool", "str", "list"):
            known = {"string": "str", "integer": "int", "boolean": "bool", "number": "float", "double": "float"}
            near = f"did you mean `{known[kind.lower()]}`?" if kind.lower() in known else ""
            near = near or did_you_mean(kind, ("int", "float", "bool", "str", "list"))
            self.fail("GP206", f"there is no type `{kind}`", kind, near or "the types are int, float, bool, str, list")
            kind = None
        return make(
            s.Param,
            name=self.name_word(name, "param"),
            type=str(kind) if kind is not None else None,
            default=None if default is None else self.expr(default),
            span=span_of(tree),
            name_span=span_of(name),
        )

    def alias(self, tree: Parsed) -> s.Alias:
        name, union = tree.children
        return make(
            s.Alias,
            name=self.name_word(name, "alias"),
            selector=self.union(union),
            span=span_of(tree),
            name_span=span_of(name),
        )

    def require(self, tree: Parsed) -> s.Require:
        return make(s.Require, test=self.expr(tree.children[0]), span=span_of(tree))

    def when(self, tree: Parsed) -> s.When:
        test, *body = tree.children
        return make(s.When, test=self.expr(test), body=tuple(self.statement(t) for t in body), span=span_of(tree))

    def patch(self, tree: Parsed) -> s.Patch:
        union, *clauses = tree.children
        found = self.clauses(clauses)
        with_ = found.pop("with_", None)
        if with_ is None:
            at = span_of(tree)
            keyword = Span(at.line, at.column, at.line, at.column + 5) if at else None
            self.fail(
                "GP115", "this patch does not say what to do", keyword, "add `with` and an op: with lora(rank=16)"
            )
        ops = tuple(self.op(t) for t in with_.children) if with_ is not None else ()
        return make(s.Patch, selector=self.union(union), ops=ops, span=span_of(tree), **found)

    def freeze(self, tree: Parsed) -> s.Freeze:
        union, *clauses = tree.children
        found = self.clauses(clauses)
        if tree.data == "freeze" and "label" in found:
            self.fail(
                "GP131",
                "`freeze` takes no label",
                found["label_span"],
                "`as` names an optimizer group, so it goes with `train`",
            )
        return make(s.Freeze, trainable=tree.data == "train", selector=self.union(union), span=span_of(tree), **found)

    train = freeze

    def map(self, tree: Parsed) -> s.Map:
        source, target, using = tree.children
        nowhere = target.data == "nowhere"
        if nowhere and using is not None:
            self.fail(
                "GP132",
                "a key that is left behind needs no `using`",
                using,
                "drop it, or name a key in place of `none`",
            )
        return make(
            s.Map,
            source=tuple(self.key(t) for t in source.children),
            target=None if nowhere else tuple(self.key(t) for t in target.children),
            using=self.op(using) if using is not None else None,
            span=span_of(tree),
        )

    def clauses(self, trees: list[Parsed]) -> dict[str, Any]:
        """The clauses as fields of a statement; `with_` is left a tree."""
        found: dict[str, Any] = {}
        seen: dict[str, Parsed] = {}
        for tree in trees:
            kind = {"waived": "expect", "expected": "expect", "with_": "with", "except_": "except", "label": "as"}.get(
                tree.data, tree.data
            )
            if kind in seen:
                again = {
                    "with": "chain ops with `then`: with a then b",
                    "where": "join the tests with `and`",
                    "except": "join the selectors with `|`",
                    "overrides": "list the labels: overrides a, b",
                }.get(kind, "keep one of them")
                first = span_of(seen[kind])
                also = (Place(self.source, first, "the first one"),) if first else ()
                self.fail("GP116", f"`{kind}` stands twice in one statement", tree, again, also=also)
                continue
            seen[kind] = tree
            if kind == "with":
                found["with_"] = tree
            elif kind == "where":
                found["where"] = self.expr(tree.children[0])
            elif kind == "except":
                found["except_"] = self.union(tree.children[0])
            elif kind == "expect":
                found["expect"] = self.expect(tree)
            elif kind == "as":
                found["label"] = self.name_word(tree.children[0], "label")
                found["label_span"] = span_of(tree.children[0])
            else:
                found["overrides"] = tuple(self.name_word(t, "label") for t in tree.children)
                found["overrides_spans"] = tuple(span_of(t) for t in tree.children)
        return found

    def expect(self, tree: Parsed) -> s.Expect:
        if tree.data == "waived":
            return make(s.Expect, any=True, span=span_of(tree))
        cmp, count, per = tree.children
        return make(
            s.Expect,
            cmp=str(cmp) if cmp is not None else "==",
            count=self.expr(count),
            per=self.selector(per) if per is not None else None,
            span=span_of(tree),
        )

    def op(self, tree: Parsed) -> s.OpCall:
        name, args = tree.children
        return make(s.OpCall, name=str(name), args=self.args(args), span=span_of(tree), name_span=span_of(name))

    def name_word(self, token: Token, what: str) -> str:
        if token in s.KEYWORDS or token.lower() in ("true", "false", "none") or (what == "alias" and token == "new"):
            why = "is the role of what the patches add" if token == "new" else "is a word of the language"
            self.fail(
                "GP117",
                f"`{token}` {why} and cannot name a{'n' if what == 'alias' else ''} {what}",
                token,
                "choose another name",
            )
        return str(token)

    # ── selectors ──

    def union(self, tree: Parsed) -> s.SelectorUnion:
        return make(s.SelectorUnion, branches=tuple(self.selector(t) for t in tree.children), span=span_of(tree))

    def selector(self, tree: Parsed) -> Any:
        cls = tree.children[-1]
        fields: dict[str, Any] = {"span": span_of(tree)}
        if cls is not None:
            fields |= {"cls_span": span_of(cls), "cls_alternative_spans": _alternatives(cls)}
        if tree.data == "regex":
            node = make(s.RegexSelector, pattern=self.regex(tree.children[0]), **fields)
        elif tree.data == "path_selector":
            root, path, _ = tree.children
            steps = tuple(self.step(t) for t in path.children)
            node = make(s.PathSelector, anchored=root is not None, steps=steps, **fields)
        else:
            node = make(s.PathSelector, anchored=tree.data == "root", **fields)
        # `model_construct` has no room for a field called `cls`.
        return node if cls is None else node.model_copy(update={"cls": _tight(cls)})

    def regex(self, token: Token) -> str:
        pattern = re.sub(r"\\(.)", lambda m: "/" if m[1] == "/" else m[0], str(token)[1:-1])
        if why := problem(pattern):
            code = "GP123" if why.startswith("it does not compile") else "GP122"
            title = "this regex does not compile" if code == "GP123" else "this regex is refused"
            why = why.removeprefix("it does not compile: ")
            self.fail(
                code, title, token, why, "a plain selector may do: `**` is any path, `*` is any text within one name"
            )
        return pattern

    def step(self, tree: Parsed) -> s.Step:
        head, index = tree.children
        fields: dict[str, Any] = {"span": span_of(tree)}
        if isinstance(head, Tree):
            fields |= {"kind": "role", "name": str(head.children[0]), "name_span": span_of(head)}
        else:
            fields |= self.segment(head)
            fields["kind"] = "quoted" if head.type == "STRING" else "glob"
        if index is not None:
            if index.data == "capture":
                name = index.children[0]
                self.fail(
                    "GP118",
                    f"`[{name}]` alone is for `map`",
                    index,
                    f"write [{name} in *] to name any index, or [${name}] for the value of a param",
                )
            fields["index"] = self.index(index)
        return make(s.Step, **fields)

    def segment(self, token: Token) -> dict[str, Any]:
        if token.type == "STRING":
            name = self.text(token)
            if name == "" or "." in name or "*" in name:
                plain = name if re.fullmatch(r"[\w*?.{},\[\]:^-]+", name) else "model.layers[*].q_proj"
                self.fail(
                    "GP113", "a selector stands without quotes", token, f"write {plain}; quotes are for one odd name"
                )
            return {"name": name, "name_span": span_of(token)}
        name = _tight(token)
        if "**" in name and name != "**":
            self.fail("GP126", "`**` stands alone between dots", token, "write `*` for any text within one name")
        return {"name": name, "name_span": span_of(token), "alternative_spans": _alternatives(token)}

    def index(self, tree: Parsed) -> s.Index:
        capture, spans = None, tree.children
        if tree.data in ("capturing", "capture"):
            capture = self.name_word(tree.children[0], "capture")
            spans = tree.children[1:]
        return make(s.Index, capture=capture, spans=tuple(self.index_span(t) for t in spans), span=span_of(tree))

    def index_span(self, tree: Parsed) -> Any:
        if tree.data == "every":
            return make(s.Every, span=span_of(tree))
        if tree.data == "at":
            return make(s.At, at=self.expr(tree.children[0]), span=span_of(tree))
        start, stop, step = (None if t is None else self.expr(t) for t in tree.children)
        if isinstance(step, s.Literal_) and step.value == 0:
            self.fail("GP127", "the step of a slice cannot be 0", tree.children[2], "drop it")
        return make(s.Range, start=start, stop=stop, step=step, span=span_of(tree))

    def key(self, tree: Parsed) -> s.KeyStep:
        children: list[Any] = tree.children
        head, bracket = children
        fields = self.segment(head)
        fields |= {"quoted": head.type == "STRING", "span": span_of(tree)}
        if bracket is not None:
            if tree.data == "key":
                fields["index"] = self.index(bracket)
            else:
                fields["at"] = self.expr(bracket)
        return make(s.KeyStep, **fields)


def _tight(token: Token) -> str:
    return re.sub(r"\s+", "", str(token))


def _alternatives(token: Token) -> tuple[Span, ...]:
    """The places of the alternatives of all `{}` in a word."""
    return tuple(
        Span(*position_in(token, brace.start() + 1 + word.start()), *position_in(token, brace.start() + 1 + word.end()))
        for brace in re.finditer(r"\{([^}]*)\}", token)
        for word in re.finditer(r"[^\s,]+", brace[1])
    )
