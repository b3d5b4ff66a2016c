"""`puna chat`: a conversation with an engine, through its chat template."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from puna.cli.run import add_engine_options, add_sampling, open_llm, sampling_params, show_stream
from puna.errors import RequestError

HELP = """\
Talk to an engine whose checkpoint was trained to answer.

  puna chat engine
  puna chat engine --system "Answer in one sentence." --temperature 0.7
  echo "What is the capital of Japan?" | puna chat engine

An empty line or Ctrl-D ends the conversation; /new starts another; Ctrl-C stops an answer.
"""


def add_commands(commands: Any, parent: argparse.ArgumentParser) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "chat",
        help="a conversation with an engine",
        description=HELP,
        parents=[parent],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("engine", metavar="DIR")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    add_sampling(parser)
    add_engine_options(parser)
    parser.set_defaults(handler=chat, max_new_tokens=512)


def chat(args: argparse.Namespace) -> int:
    params = sampling_params(args)
    opening = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(opening)
    is_terminal = sys.stdin.isatty()
    with open_llm(args) as llm:
        while text := _ask(is_terminal):
            if text == "/new":
                messages = list(opening)
                continue
            messages.append({"role": "user", "content": text})
            try:
                answer = _answer(llm, messages, params, is_terminal)
            except RequestError as error:
                if not is_terminal:
                    raise
                print(f"{error} (/new starts another conversation)")
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer})
    return 0


def _ask(is_terminal: bool) -> str:
    """One line of the user's; empty at the end of the conversation."""
    try:
        return input("> " if is_terminal else "").strip()
    except EOFError:
        return ""
    except UnicodeDecodeError as error:
        raise RequestError(f"the text on stdin is not UTF-8 ({error}): convert it") from error


def _answer(llm: Any, messages: list[dict[str, str]], params: Any, is_terminal: bool) -> str:
    shown: list[str] = []

    def deltas() -> Any:
        for delta in llm.stream_chat(messages, params):
            shown.append(delta.text)
            yield delta

    try:
        return show_stream(deltas())
    except KeyboardInterrupt:
        if not is_terminal:
            raise
        print()
        return "".join(shown)
