"""Which regexes are safe. What is let through is run on texts that would hang what is refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphpatch.lang.regex import problem

REFUSED = r"""(a+)+ (a|a)* (.*)* (a|ab|b)*c (a*)*b (\w+\w*)+x .*.*.*x (a?)* (a+b?)+c ((ab)*a?)* (?:a|b|ab)+
(a{1,500}){500} (a)\1 ([a-z]+)*$ (\w+\.?)*x ((a+)+)b (((a|b)+c?)+d) (a+|b+)+ (?:a[ab]|[ab]*)+x (?:(?:ab|ab)|a)+
.*a.*b.*c.*d.* (?i:(?:ab|AB)*) ((a|b)+)*c (?:\d+|[a-z]+\.)*x (a*?)*? (?:x|(?:y|xz?)+)*w
(a|aa){40}c (a{1,9}){1,9}c .*\w.*\w.*\w.*zz a?a?a?a?a?a?a?a?a?a?a?a?a?a?a?a?a?a?a?a?aaaaaaaaaaaaaaaaaaaa""".split()

ALLOWED = r"""(?:\w+\.)*q_proj (\w+\.)*x model\.layers\.\d+\.mlp\..* .*q_proj$ .*\.layers\..*\.q (a|b)* (?:a|b)+c
model\.layers\.\d+\.self_attn\.[qkv]_proj .*\.(q|k|v)_proj (?:layer\d+\.)+x .*\.\d+\..* ([^.]+\.)*q ^model\.(.*)$
(?!.*vision).*q_proj (?:(?:a|b)\.)*c (\w+(\.|/))*x (?:encoder|decoder)\.(?:layers|blocks)\.\d+\..*(?:q|v)_proj
.*(attn|mlp).* (x(a+|b))* .*\.layers\.\d+\..*attn.*proj (a|ab)*c (?:\d{1,3}\.)+x (\w|\d)+
(?:base_model\.)?(?:model\.)?layers\.\d{1,3}\.(?:self_attn|mlp)\.(?:q|k|v|gate|up|down)_proj""".split()

BROKEN = [
    r"(",
    r"a{99999999999}",
    r"[z-a]",
    r"*a",
    r"a**",
    r"(?P<x>a)(?P<x>b)",
    r"\8",
    "(" * 300 + ")" * 300,
    "x" * 600,
]


@pytest.mark.parametrize("pattern", REFUSED)
def test_refused(pattern: str) -> None:
    re.compile(pattern)
    assert problem(pattern)


@pytest.mark.parametrize("pattern", ALLOWED)
def test_allowed_and_quick(pattern: str) -> None:
    assert problem(pattern) is None
    for text in (
        "a" * 60 + "!",
        "ab" * 40 + "!",
        "a.b." * 20 + "!",
        "x" * 70 + "!",
        "1" * 70 + "!",
        "layer1." * 12 + "!",
    ):
        re.fullmatch(pattern, text)  # would not come back, were it exponential


@pytest.mark.parametrize("pattern", BROKEN)
def test_broken(pattern: str) -> None:
    assert problem(pattern)


_pieces = st.recursive(
    st.sampled_from(["a", "b", ".", "[ab]", "ab", r"\w"]),
    lambda inner: (
        st.builds("(?:{}){}".format, inner, st.sampled_from("*+?"))
        | st.builds("(?:{}|{})".format, inner, inner)
        | st.builds("{}{}".format, inner, inner)
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(_pieces)
def test_what_is_allowed_is_quick(pattern: str) -> None:
    if problem(pattern) is None:
        for text in ("a" * 40 + "!", "ab" * 20 + "!", "b" * 40 + "!", "aab" * 13 + "!"):
            re.fullmatch(pattern, text)
