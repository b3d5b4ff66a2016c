"""`puna run`: text from an engine, once."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.cli.progress import byte_bar
from puna.errors import RequestError
from puna.runtime.launch import find_world

if TYPE_CHECKING:
    from puna.llm import LLM
    from puna.runtime.request import RequestOutput, SamplingParams

HELP = """\
Continue a prompt.

  puna run engine --prompt "Once upon a time" --max-new-tokens 100 --stream
  puna run engine --prompt "Dear" --temperature 0.8 --top-p 0.95 --seed 1
  puna run engine --prompt "2, 3, 5, 7," --temperature 0 --json
  puna run engine --prompt "Dear" --num-beams 4

Sampling options that are left out are the engine's defaults, which the checkpoint gave; without any
it is greedy (temperature 0).
"""


def add_commands(commands: Any, parent: argparse.ArgumentParser) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "run",
        help="text from an engine",
        description=HELP,
        parents=[parent],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("engine", metavar="DIR")
    add("--prompt", required=True, metavar="TEXT", help="text to continue; - reads stdin")
    add("--stream", action="store_true", help="print text as it comes")
    add("--json", action="store_true", help="one JSON object")
    add_sampling(parser)
    add_beams(parser)
    add_engine_options(parser)
    parser.set_defaults(handler=run)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Arguments of SamplingParams; see `sampling_params`."""
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    add("--temperature", type=float, metavar="X", help="0 is greedy")
    add("--top-k", type=int, metavar="N", help="sample from the N most likely tokens; 0: all")
    add("--top-p", type=float, metavar="X", help="sample from the most likely that sum to X")
    add("--min-p", type=float, metavar="X", help="drop tokens below X times the most likely")
    add("--repetition-penalty", type=float, metavar="X", help="1: none")
    add("--presence-penalty", type=float, default=0.0, metavar="X", help="0: none")
    add("--frequency-penalty", type=float, default=0.0, metavar="X", help="0: none")
    add("--seed", type=int, metavar="N", help="the same seed samples the same text")
    add("--stop", action="append", default=[], metavar="TEXT", help="end there; may be repeated")
    add("--ignore-eos", action="store_true", help="go on after the end-of-text token")


def add_beams(parser: argparse.ArgumentParser) -> None:
    """Arguments of SamplingParams for beam search."""
    group = parser.add_argument_group("beam search")
    add = group.add_argument
    add("--num-beams", type=int, default=1, metavar="N", help="beams to follow; default: 1, none")
    add(
        "--length-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="scores are sums of logprobs / length ** X; default: %(default)s",
    )
    add(
        "--early-stopping",
        nargs="?",
        const=True,
        default=False,
        choices=["never"],
        help="end with N finished beams; never: only when no beam can become better",
    )


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    from puna.runtime.request import SamplingParams

    return SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        seed=args.seed,
        stop=tuple(args.stop),
        ignore_eos=args.ignore_eos,
    )


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Arguments of LLM; see `open_llm`."""
    group = parser.add_argument_group("engine")
    add = group.add_argument
    add_device_options(group)
    add("--kv-cache-bytes", type=int, metavar="N", help="default: what the engine planned")
    add("--tokenizer", metavar="DIR", help="in place of the engine's")
    add(
        "--chat-template",
        metavar="FILE",
        help="a Jinja template in place of the tokenizer's, or the text of one",
    )


def add_device_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """What computes, and where rank 0 of several is met."""
    parser.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, cpu:INSTRUCTION_SET (cpu:avx2, cpu:portable, ...), cuda, cuda:N (one of "
        "several GPUs), or reference: NumPy, slow and exact (default: auto, which is what the "
        "engine was built for)",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="on a GPU: tokens that do not depend on what else runs, as elsewhere; slower",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads, of each rank (default: its physical cores)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars and no notes")
    parser.add_argument(
        "--master-addr",
        metavar="HOST",
        help="rank 0's host, for engines of several ranks (default: what the launcher tells)",
    )
    parser.add_argument(
        "--master-port",
        type=int,
        metavar="N",
        help="the port at which rank 0 waits for the others (default: one of the job's own)",
    )


def print_notice(llm: LLM) -> None:
    """Say, in a line on stderr, when the engine runs slower than it could."""
    if llm.session is not None and llm.session.notice:
        print(f"puna: {llm.session.notice}", file=sys.stderr)


def open_llm(
    args: argparse.Namespace, max_batch_size: int | None = None, prefix_cache: bool = True
) -> LLM:
    """The engine that the arguments name; on ranks other than 0 this serves rank 0, and does not
    return."""
    from puna.llm import LLM

    with byte_bar("loading", args.quiet) as progress:
        llm = LLM(
            args.engine,
            device=args.device,
            threads=args.threads,
            deterministic=args.deterministic,
            kv_cache_bytes=args.kv_cache_bytes,
            tokenizer=args.tokenizer,
            chat_template=_template(args.chat_template),
            prefix_cache=prefix_cache,
            max_batch_size=max_batch_size,
            progress=progress,
            world=find_world(args.master_addr, args.master_port),
        )
    if not args.quiet:
        print_notice(llm)
    return llm


def _template(text_or_file: str | None) -> str | None:
    if text_or_file is None or "{" in text_or_file:
        return text_or_file
    try:
        return Path(text_or_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"--chat-template {text_or_file} is neither a template nor a file with one ({error})"
        ) from error


def run(args: argparse.Namespace) -> int:
    if args.stream and args.json:
        raise RequestError("--stream and --json exclude each other: choose one")
    if args.stream and args.num_beams > 1:
        raise RequestError(
            "--stream and --num-beams exclude each other: the best beam is known at the end only"
        )
    params = replace(
        sampling_params(args),
        num_beams=args.num_beams,
        length_penalty=args.length_penalty,
        early_stopping=args.early_stopping,
    )
    prompt = _prompt(args.prompt)
    with open_llm(args) as llm:
        if args.stream:
            show_stream(llm.stream(prompt, params))
            return 0
        start = time.perf_counter()
        (output,) = llm.generate([prompt], params)
        seconds = time.perf_counter() - start
    if args.json:
        print(json.dumps(_as_json(output, seconds)))
    else:
        print(output.text)
    return 0


def _prompt(text: str) -> str:
    if text == "-":
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"the prompt on stdin is not UTF-8 ({error}): convert it") from error
    if not text:
        raise RequestError("the prompt is empty; it needs at least one character: write one")
    return text


def _as_json(output: RequestOutput, seconds: float) -> dict[str, Any]:
    score = {} if output.score is None else {"score": output.score}
    return {
        "text": output.text,
        "token_ids": list(output.token_ids),
        "finish_reason": output.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": len(output.token_ids),
        "seconds": round(seconds, 6),
        **score,
    }


def show_stream(deltas: Any) -> str:
    """Print deltas as they come, end the line, and return the text."""
    pieces = []
    for delta in deltas:
        pieces.append(delta.text)
        print(delta.text, end="", flush=True)
    print()
    return "".join(pieces)
