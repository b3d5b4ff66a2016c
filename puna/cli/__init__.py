"""The command line: argument names, messages, exit statuses. The rest is the Python API's.

Exit status 0; 2 for what the user can mend, with one line on stderr; 130 on Ctrl-C. A traceback of
such an error only with --debug. Command modules are imported here for their arguments; what they
need to work is imported when they run, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from puna.cli import build, chat, inspect, quickstart, run
from puna.errors import PunaError

DESCRIPTION = """\
puna builds engines for LLaMA-family models and runs them.

  puna quickstart                          a small model, from nothing to an answer
  puna build CHECKPOINT -o ENGINE          Hugging Face, Meta or GGUF weights to an engine
  puna run ENGINE --prompt "Once upon"     text from the engine
  puna chat ENGINE                         a conversation with it

A checkpoint is a directory with published weights, a .gguf file, or a hub id (org/name). An
engine is the directory that puna builds from it, laid out for one target: copy it, inspect it,
verify it.
"""

EPILOG = "Each command has its own help, with examples: puna build --help"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return args.handler(args)
    except KeyboardInterrupt:
        print("\npuna: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone; the interpreter must not complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except PunaError as error:
        if args.debug:
            raise
        print(f"puna: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: PunaError) -> str:
    text = " ".join(str(error).split())
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _parser() -> argparse.ArgumentParser:
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(
        prog="puna",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"puna {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for module in (quickstart, build, inspect, run, chat):
        module.add_commands(commands, debug)
    return parser


def _version() -> str:
    from puna.version import puna_version

    return puna_version()
