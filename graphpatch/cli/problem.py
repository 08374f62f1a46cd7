"""The one kind of error this room adds: what was asked for cannot even be tried (GP7xx)."""

from __future__ import annotations

from ..lang.diagnostics import Diagnostic, Error


class CannotRun(Error):
    """A file that is not there, a model that cannot be built: nothing was found out about the rules."""

    def __init__(self, code: str, title: str, *fixes: str, text: tuple[str, ...] = ()):
        super().__init__(Diagnostic(code, title, text=text, fixes=tuple(filter(None, fixes))))

    @classmethod
    def because(cls, error: Error) -> CannotRun:
        """What another room found, told as a reason not to run."""
        made = cls("", "")
        Error.__init__(made, error.diagnostics)
        return made


def first_line(error: BaseException) -> str:
    """`ValueError: what it says`, on one line of bearable length."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    said = " ".join(" ".join(lines[:3]).split())
    name = type(error).__name__
    return f"{name}: {said[:400]}" if said else name
