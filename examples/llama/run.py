"""run.py: text from an engine, with the flags of the LLaMA guide. The work is puna.LLM's.

Decides what the flags mean to puna, and the form of the files of token ids: a row a sequence,
prompt and continuation, as the guide's system writes and reads them.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from flags import Flags, Parser, print_notes

from puna import LLM, SamplingParams
from puna.cli import exit_status
from puna.cli.progress import byte_bar
from puna.errors import ConfigError, RequestError, TokenizerError
from puna.runtime.launch import find_world
from puna.runtime.request import RequestOutput
from puna.summarize import find_tokenizer

DESCRIPTION = """\
Text from an engine, with the flags of the LLaMA guide.

  python run.py --max_output_len=50 --tokenizer_dir ./tmp/llama/7B/ \\
                --engine_dir=./tmp/llama/7B/trt_engines/fp16/1-gpu/
  mpirun -n 2 python run.py --max_output_len=50 --engine_dir=./tmp/llama/7B/trt_engines/fp16/2-gpu/
"""
DEFAULTS = {
    "log_level": "error", "engine_dir": "llama_outputs", "tokenizer_dir": ".",
    "input_text": ["Born in north-east France, Soyer trained as a"], "num_beams": 1,
    "streaming_interval": 5, "temperature": 1.0, "top_k": 1, "top_p": 0.0, "length_penalty": 1.0,
    "repetition_penalty": 1.0,
}  # fmt: skip
Prompt = str | list[int]


def parser() -> Parser:
    parser = Parser(DESCRIPTION)
    add = parser.add_argument
    add("--max_output_len", type=int, required=True, metavar="N", help="new tokens at most")
    add("--engine_dir", metavar="DIR", help="default: llama_outputs")
    add(
        "--tokenizer_dir",
        metavar="DIR",
        help="or its hf/; else the engine's tokenizer is taken (.)",
    )
    parser.add_log_level(str(DEFAULTS["log_level"]))
    add("--input_text", nargs="+", metavar="TEXT", help="one prompt or several, run together")
    add("--input_tokens", metavar="FILE", help="prompts as token ids, a row each: .csv or .npy")
    add("--input_file", metavar="FILE", help="the same; or .txt, a prompt of text")
    add("--output_csv", metavar="FILE", help="write token ids there, a row a sequence")
    add("--output_npy", metavar="FILE", help="the same as an int32 array, padded at the end")
    add("--num_beams", type=int, metavar="N", help="beam search, and all beams shown (1)")
    add("--length_penalty", type=float, metavar="X", help="of beams (1)")
    add("--streaming", action="store_true", help="text as it comes")
    add("--streaming_interval", type=int, metavar="N", help="in tokens (5)")
    add("--temperature", type=float, metavar="X", help="where it samples (1)")
    add("--top_k", type=int, metavar="N", help="1 is greedy; 0: no limit but --top_p (1)")
    add("--top_p", type=float, metavar="X", help="0: no limit but --top_k (0)")
    add("--repetition_penalty", type=float, metavar="X", help="1")
    add("--max_kv_cache_len", type=int, metavar="N", help="refused where it would cut a sequence")
    parser.add_master()
    return parser


def check_flags(flags: Flags) -> None:
    """ConfigError for flags that contradict each other."""
    flags.exclude("input_text", "input_tokens", "input_file")
    flags.exclude("streaming", "output_csv")
    flags.exclude("streaming", "output_npy")
    if "streaming" in flags and flags["num_beams"] > 1:
        raise ConfigError(
            "--streaming and --num_beams exclude each other: the best beam is known last"
        )
    if "streaming_interval" in flags and "streaming" not in flags:
        raise ConfigError("--streaming_interval needs --streaming: give both, or neither")
    if flags["streaming_interval"] < 1:
        raise ConfigError(f"--streaming_interval is {flags['streaming_interval']}; at least 1")


def is_greedy(flags: Flags) -> bool:
    return flags["top_k"] == 1 or (flags["top_k"] == 0 and flags["top_p"] == 0)


def sampling_notes(flags: Flags) -> list[str]:
    """What was asked of sampling where nothing is sampled."""
    idle = [name for name in ("temperature", "top_p") if name in flags]
    if not is_greedy(flags) or not idle:
        return []
    return [f"{', '.join(idle)}: greedy without --top_k above 1, or --top_k 0 and --top_p"]


def sampling_params(flags: Flags) -> SamplingParams:
    """All of it stated, so that no default of the checkpoint comes in."""
    top_k, top_p, num_beams = flags["top_k"], flags["top_p"], flags["num_beams"]
    if is_greedy(flags):
        top_k = top_p = 0
    return SamplingParams(
        max_new_tokens=flags["max_output_len"],
        temperature=0.0 if is_greedy(flags) else flags["temperature"],
        top_k=top_k,
        top_p=top_p or 1.0,
        min_p=0.0,
        repetition_penalty=flags["repetition_penalty"],
        seed=0,
        n=num_beams,
        num_beams=num_beams,
        length_penalty=flags["length_penalty"],
    )


def read_prompts(flags: Flags) -> list[Prompt]:
    rows: list[Prompt] = []
    name = "input_tokens" if "input_tokens" in flags else "input_file"
    if name not in flags:
        return flags["input_text"]
    path = Path(flags[name])
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                rows += [list(map(int, row)) for row in csv.reader(file) if row]
        elif path.suffix == ".npy":
            rows += np.atleast_2d(np.load(path)).astype(np.int64, casting="safe").tolist()
        elif path.suffix == ".txt" and name == "input_file":
            return [path.read_text(encoding="utf-8").rstrip("\n")]
        else:
            raise ValueError("it is named neither .csv nor .npy")
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(
            f"--{name} {path} cannot be read ({error}): needed rows of token ids in a .csv or .npy"
        ) from error
    if not rows:
        raise RequestError(f"--{name} {path} has no rows: write the token ids of a prompt into it")
    return rows


def without_padding(prompts: list[Prompt], llm: LLM) -> list[Prompt]:
    """Rows of token ids end at the padding, which is the end-of-text token."""
    eos = llm.config.generation.eos_token_ids
    for prompt in prompts:
        while isinstance(prompt, list) and len(prompt) > 1 and prompt[-1] in eos:
            prompt.pop()
    return prompts


def check_kv_cache_len(flags: Flags, llm: LLM, prompts: list[Prompt]) -> None:
    """ConfigError where a sequence would outgrow the window that max_kv_cache_len asks for."""
    longest = max(
        len(llm.tokenizer.encode(prompt))
        if isinstance(prompt, str) and llm.tokenizer
        else len(prompt)
        for prompt in prompts
    )
    needed = longest + flags["max_output_len"]
    if needed > flags["max_kv_cache_len"]:
        raise ConfigError(
            f"--max_kv_cache_len {flags['max_kv_cache_len']}, and a sequence may have {needed} "
            "tokens; puna forgets none of them: raise it, or lower --max_output_len"
        )


def open_llm(flags: Flags) -> tuple[LLM, list[str]]:
    """The engine and notes; on ranks other than 0 this serves rank 0, and does not return."""
    notes: list[str] = []
    folder = None
    try:
        folder, note = find_tokenizer(flags["tokenizer_dir"], flags["engine_dir"])
        # The default is the working directory, where nobody expects a tokenizer.
        notes += [note] if note and "tokenizer_dir" in flags else []
    except TokenizerError as error:
        notes.append(str(error))
    bar = byte_bar("loading") if flags.is_talkative else nullcontext()
    with bar as progress:
        world = find_world(flags["master_addr"], flags["master_port"])
        llm = LLM(flags["engine_dir"], tokenizer=folder, progress=progress, world=world)
    return llm, notes


def run(flags: Flags) -> int:
    check_flags(flags)
    params, prompts = sampling_params(flags), read_prompts(flags)
    llm, notes = open_llm(flags)
    with llm:
        prompts = without_padding(prompts, llm)
        if "max_kv_cache_len" in flags:
            check_kv_cache_len(flags, llm, prompts)
            notes.append("max_kv_cache_len: every sequence fits")
        print_notes([*notes, *sampling_notes(flags)])
        if "streaming" in flags:
            for prompt in prompts:
                show_stream(llm, prompt, params, flags["streaming_interval"])
            return 0
        start = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - start
        if "output_csv" in flags or "output_npy" in flags:
            write_files(flags, llm, outputs)
        else:
            show(llm, prompts, outputs)
    if flags.is_talkative:
        num_tokens = sum(len(part.token_ids) for output in outputs for part in output.completions)
        print(f"{num_tokens} tokens in {seconds:.2f} s: {num_tokens / seconds:.1f} tokens/s")
    return 0


def text_of(llm: LLM, prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return llm.tokenizer.decode(prompt) if llm.tokenizer else str(prompt)


def show(llm: LLM, prompts: Sequence[Prompt], outputs: Sequence[RequestOutput]) -> None:
    for prompt, output in zip(prompts, outputs, strict=True):
        print(f'Input: "{text_of(llm, prompt)}"')
        for part in output.completions:
            print(f'Output: "{part.text if llm.tokenizer else list(part.token_ids)}"')


def show_stream(llm: LLM, prompt: Prompt, params: SamplingParams, interval: int) -> None:
    """Print the continuation as it comes, `interval` tokens at a time."""
    print(f'Input: "{text_of(llm, prompt)}"')
    print('Output: "', end="", flush=True)
    held, num_tokens = "", 0
    for delta in llm.stream(prompt, params):
        held += delta.text if llm.tokenizer else "".join(f"{i} " for i in delta.token_ids)
        num_tokens += len(delta.token_ids)
        if num_tokens >= interval or delta.finish_reason:
            print(held, end="", flush=True)
            held, num_tokens = "", 0
    print('"')


def write_files(flags: Flags, llm: LLM, outputs: Sequence[RequestOutput]) -> None:
    """Prompt and continuation of each sequence, the beams of a prompt one after the other."""
    rows = [
        [*output.prompt_token_ids, *part.token_ids]
        for output in outputs
        for part in output.completions
    ]
    eos = llm.config.generation.eos_token_ids
    longest = max(map(len, rows))
    padded = np.full((len(rows), longest), eos[0] if eos else 0, np.int32)
    for padded_row, row in zip(padded, rows, strict=True):
        padded_row[: len(row)] = row
    for name in ("output_csv", "output_npy"):
        if name not in flags:
            continue
        path = Path(flags[name])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if name == "output_npy":
                np.save(path, padded)
            else:
                with path.open("w", encoding="utf-8", newline="") as file:
                    csv.writer(file).writerows(padded.tolist())
        except OSError as error:
            raise RequestError(f"--{name} {path} cannot be written: {error.strerror}") from error
        print(f"{path}: {len(rows)} sequences of up to {longest} token ids")


if __name__ == "__main__":
    sys.exit(exit_status(lambda: run(Flags(parser(), DEFAULTS))))
