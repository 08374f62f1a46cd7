"""`python -m graphpatch.lang.compile` makes `rules.lark.compiled` from `rules.lark`; run it after changing the grammar.

The first line of the result names the lark version and the hash of the text it was made from. Where either differs
the tables are made at start, which costs some 0.2 s, and never read wrongly.
"""

from __future__ import annotations

import io

from .grammar import COMPILED, compile_grammar, heading


def compiled() -> bytes:
    """The compiled form, as it should stand in the file."""
    tables = io.BytesIO()
    compile_grammar().save(tables)
    return heading() + b"\n" + tables.getvalue()


if __name__ == "__main__":
    COMPILED.write_bytes(compiled())
    print(f"{COMPILED.name}: {COMPILED.stat().st_size} bytes")
