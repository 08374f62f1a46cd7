"""The process `graphpatch`, and `python -m graphpatch.cli` where that is not on the path."""

import os
import sys
from contextlib import suppress
from typing import NoReturn

from .main import main


def run() -> NoReturn:
    """Run the command and end at once: taking apart what torch has built lasts longer than most commands do."""
    try:
        code = main()
    except SystemExit as ended:  # argparse's
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
