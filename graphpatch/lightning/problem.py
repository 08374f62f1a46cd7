"""What Lightning users are told."""

from __future__ import annotations

from ..lang.diagnostics import ApplyError, Diagnostic


def refusal(code: str, title: str, *fixes: str, text: tuple[str, ...] = ()) -> ApplyError:
    return ApplyError(Diagnostic(code, title, text=text, fixes=fixes))
