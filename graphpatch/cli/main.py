"""`graphpatch`: which command runs, and what becomes of errors: one message and an exit code, never a traceback."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from ..lang.diagnostics import Error, did_you_mean
from ..tree.collection import no_collection
from .problem import CannotRun, first_line
from .terminal import print_error

COMMANDS = {
    "check": "is there anything wrong with rule files, as far as can be told without a model?",
    "plan": "what would the rules change in a model? Changes nothing.",
    "tree": "a model as text: classes, shapes, attributes",
    "match": "what does a selector match in a model?",
    "explain": "which rules touch a module, and where did the others stop matching?",
    "diff": "what differs between two models, renames included",
    "validate": "which servers read an adapter, which refuse or misread it, and does it have an effect?",
    "merge": "a checkpoint with an adapter merged into its weights, tensor by tensor, without the model",
    "export": "write an adapter as a server reads it",
    "import": "the LoRA of an adapter in PEFT's format, as a rule file",
    "ops": "the ops that a rule can name, and their arguments",
    "rules": "the rule files that come with graphpatch",
}
"""Each is a file of this room of the same name with `add_arguments(parser)` and `run(options) -> exit code`."""

EXIT_CODES = """\
exit codes:
  0  check, validate: nothing found; plan: planned; match: something matched; diff: no difference
  1  check, plan, explain: something is wrong with the rules; match: no match; diff: they differ;
     validate: a reader refuses or misreads the adapter, or a part of it has no effect; export: it would be so
  2  could not run; but `plan`: 1, since `plan --exit-code` says 2 where there is something to change"""


class Parser(argparse.ArgumentParser):
    """Says what was probably meant, and exits as the command exits that could not run."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.partition(" ")[2]
        if "invalid choice: " in message:
            word = message.partition("invalid choice: ")[2].partition(" ")[0].strip("'\"")
            message = f"there is no command `{word}`; " + (
                did_you_mean(word, COMMANDS) or f"commands: {', '.join(COMMANDS)}"
            )
        self.print_usage(sys.stderr)
        self.exit(_failed(command, could_not_run=True), f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `graphpatch` with these arguments (those of the process where none are given); returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = ""
    try:
        options = _parser(arguments).parse_args(arguments)
        if options.version:
            print(_version())
            return 0
        command = options.command or ""
        if not command:
            _parser(arguments).print_help()
            return 0
        # No text of a model may make printing fail, whatever the terminal's encoding is.
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        code = options.run(options)
        sys.stdout.flush()
        return code
    except Error as error:
        print_error(error)
        return _failed(command, isinstance(error, CannotRun))
    except BrokenPipeError:
        # The reader has gone (`| head`); Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("GRAPHPATCH_DEBUG"):
            raise
        print(
            f"graphpatch: internal error, please report it: {first_line(error)}\n  = GRAPHPATCH_DEBUG=1 shows where",
            file=sys.stderr,
        )
        return _failed(command, could_not_run=True)


def _failed(command: str, could_not_run: bool) -> int:
    if command == "plan":
        return 1
    return 2 if could_not_run or command not in ("check", "explain", "validate") else 1


def _parser(arguments: Sequence[str]) -> Parser:
    parser = Parser(
        prog="graphpatch",
        description="Rewrite the module graph of any PyTorch model from a rule file: see what would change, and why.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="the version, and those of what it works with")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, about in COMMANDS.items():
        one = commands.add_parser(
            name, help=about, description=about, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        # Only the file of the command that was asked for is imported.
        if name in arguments:
            with no_collection():
                module = import_module(f".{name}", __package__)
            module.add_arguments(one)
            one.set_defaults(run=module.run)
    return parser


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    from .. import __version__

    others = []
    for package in ("torch", "transformers"):
        try:
            others.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            others.append(f"{package} not installed")
    return f"graphpatch {__version__} ({', '.join(others)}, Python {sys.version.split()[0]})"
