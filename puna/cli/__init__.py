"""The command line: argument names, messages, exit statuses. The rest is the Python API's.

Exit status 0; 2 for what the user can mend, with one line on stderr; 130 on Ctrl-C. A traceback of
such an error only with --debug. Command modules are imported here for their arguments; what they
need to work is imported when they run, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from io import BufferedWriter, RawIOBase, TextIOWrapper
from typing import NoReturn

from puna.cli import bench, build, chat, inspect, launch, quickstart, run, summarize
from puna.errors import PunaError
from puna.runtime.launch import speaks_for_all

DESCRIPTION = """\
puna builds engines for LLaMA-family models and runs them.

  puna quickstart                          a small model, from nothing to an answer
  puna build CHECKPOINT -o ENGINE          Hugging Face, Meta or GGUF weights to an engine
  puna run ENGINE --prompt "Once upon"     text from the engine
  puna chat ENGINE                         a conversation with it
  puna summarize ENGINE                    ROUGE of its summaries of news articles
  puna launch -n 2 -- run ENGINE ...       an engine built for 2 processes (build --tp 2)

A checkpoint is a directory with published weights, a .gguf file, or a hub id (org/name). An
engine is the directory that puna builds from it, laid out for one target: copy it, inspect it,
verify it.
"""

EPILOG = "Each command has its own help, with examples: puna build --help"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, as for every other error."""

    def error(self, message: str) -> NoReturn:
        line = f"puna: {_one_line(message)} (see {self.prog} --help)\n"
        self.exit(2, line if speaks_for_all() else None)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = _parser()
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(arguments)
    args.command_line = shlex.join(["puna", *arguments])
    if args.command is None:
        parser.print_help()
        return 0
    return exit_status(lambda: args.handler(args), args.debug)


def exit_status(work: Callable[[], int], debug: bool = False) -> int:
    """Do the work of a command; say in one line what went wrong, and return the exit status.

    Of several ranks only rank 0 speaks. `debug` lets a PunaError through, with its traceback.
    """
    _print_anything()
    try:
        status = work()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        if speaks_for_all():
            print("\npuna: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone; the interpreter must not complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except PunaError as error:
        if debug:
            raise
        if speaks_for_all():
            print(f"puna: {_one_line(str(error))}", file=sys.stderr)
        return 2


def _one_line(text: str) -> str:
    """File names and checkpoints may hold line breaks, and codes that would steer the terminal."""
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _print_anything() -> None:
    """A file name that is no Unicode, or a terminal that is not UTF-8, must not end a command.

    Nor may a write that a signal cut short lose the rest, as it does below PYTHONUNBUFFERED or -u:
    there the text layer ignores how much the file took (CPython issue 85393).
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, TextIOWrapper):
            continue
        stream.reconfigure(errors="backslashreplace")
        if stream is getattr(sys, f"__{name}__") and isinstance(stream.buffer, RawIOBase):
            whole = BufferedWriter(stream.buffer)
            form = (stream.encoding, stream.errors, None)
            setattr(sys, name, TextIOWrapper(whole, *form, line_buffering=True))


def _parser() -> argparse.ArgumentParser:
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = _Parser(
        prog="puna",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show puna's version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for module in (quickstart, build, inspect, run, chat, bench, summarize, launch):
        module.add_commands(commands, debug)
    return parser


class _Version(argparse.Action):
    """Looks the version up only when it is asked for: that takes as long as importing NumPy."""

    def __call__(self, parser: argparse.ArgumentParser, *args: object) -> NoReturn:
        from puna.version import puna_version

        print(f"puna {puna_version()}")
        parser.exit()
