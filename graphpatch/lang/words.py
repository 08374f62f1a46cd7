"""How names and strings are written: what needs quotes, and how characters are escaped."""

from __future__ import annotations

import re

SEGMENT = re.compile(r"(?:[\w*?]|\{[\w*?]+(?:,[\w*?]+)*\})+")
CLASS = re.compile(r"=?(?:[A-Za-z_*?][\w.*?]*|\{[\w.*?]+(?:,[\w.*?]+)*\})")
NAME = re.compile(r"[A-Za-z_]\w*")
DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "\\": "\\", '"': '"', "'": "'", "/": "/"}
_WRITTEN = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\", '"': '\\"'}
_ESCAPE = re.compile(r"\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)", re.DOTALL)


class BadEscape(Exception):
    """An escape that means nothing: `text`, from `start` to `end` in what was read."""

    def __init__(self, text: str, start: int):
        super().__init__(text)
        self.text, self.start, self.end = text, start, start + len(text)


def unquote(written: str) -> str:
    """The text of a string with its quotes; raises `BadEscape`."""

    def one(match: re.Match[str]) -> str:
        escape = match[0][1:]
        if len(escape) > 1:
            code = int(escape[1:], 16)
            if code > 0x10FFFF or 0xD800 <= code < 0xE000:
                raise BadEscape(match[0], match.start())
            return chr(code)
        if escape not in _ESCAPES:
            raise BadEscape(match[0], match.start())
        return _ESCAPES[escape]

    body = _ESCAPE.sub(one, written[:-1])
    return body[1:]


def quote(text: str) -> str:
    """A string in double quotes that reads back as `text`."""
    return '"' + "".join(_WRITTEN.get(c) or (c if c.isprintable() else _escaped(ord(c))) for c in text) + '"'


def _escaped(code: int) -> str:
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
