"""How far logits are from float32's with the same weights: puna's, and llama.cpp's.

    python -m benchmarks.quality MODEL.gguf --peer-python PYTHON [--write NAME]

Each draw is 64 random tokens, prefilled in one go, and 16 more random tokens decoded one by one
(teacher-forced); the figure is the relative L2 error of the logits of all 80 positions. All three
have the file's own weights: the reference is a float32 engine of the dequantised checkpoint on
puna's reference ops, puna is the engine that `puna build MODEL.gguf` makes, on --device, and
llama.cpp has its defaults (a float16 KV cache). The bar is a ratio of medians of at most 1.1.

PYTHON is an interpreter with llama-cpp-python (see `benchmarks.llamacpp`). The reference takes four
bytes a weight on disk and in memory, and some minutes for a model of 1.1B;
--reference-device cpu is fast, and differs by 1e-6 (SmolLM2) to 7e-6 (TinyLlama).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

NUM_PREFILL, NUM_DECODE = 64, 16
NUM_TOKENS = NUM_PREFILL + NUM_DECODE
BAR = 1.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--peer-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--device", default="cpu", help="of puna (default: cpu)")
    parser.add_argument(
        "--reference-device",
        default="reference",
        choices=("reference", "cpu"),
        help="of the float32 engine (default: reference)",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--write", metavar="NAME", help="keep results/NAME.json")
    parser.add_argument("--as-peer", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_peer:
        print(json.dumps(peer(args.gguf, args.threads, args.as_peer)))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = compare(args, Path(folder))
    print(table(found))
    if args.write:
        from benchmarks.record import about, write

        write(args.write, {**about("quality"), **found})


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    ids_DT = draw(args.gguf, args.draws)
    np.save(folder / "ids.npy", ids_DT)
    exact_DTV, _ = puna(
        args.gguf, folder / "float32", ids_DT, args.reference_device, args.threads, is_exact=True
    )
    ours_DTV, engine = puna(args.gguf, folder / "engine", ids_DT, args.device, args.threads)
    command = [args.peer_python, __file__, str(args.gguf), "--as-peer", str(folder)]
    command += ["--threads", str(args.threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    version = json.loads(done.stdout)["version"]
    theirs_DTV = np.load(folder / "logits.npy", mmap_mode="r")

    rows = []
    for i, exact_TV in enumerate(exact_DTV):
        ours, theirs = relative_l2(exact_TV, ours_DTV[i]), relative_l2(exact_TV, theirs_DTV[i])
        rows.append(
            {
                "draw": i,
                "puna": ours,
                "llama.cpp": theirs,
                "ratio": ours / theirs,
                "same_argmax_puna": same_argmax(exact_TV, ours_DTV[i]),
                "same_argmax_llama.cpp": same_argmax(exact_TV, theirs_DTV[i]),
            }
        )
    median = {name: statistics.median(row[name] for row in rows) for name in ("puna", "llama.cpp")}
    ratio = median["puna"] / median["llama.cpp"]
    return {
        "model": args.gguf.name,
        "prefilled": NUM_PREFILL,
        "decoded": NUM_DECODE,
        "reference": f"float32 engine, device {args.reference_device}",
        "puna": engine,
        "peer": f"llama-cpp-python {version}",
        "threads": args.threads,
        "relative_l2": rows,
        "median": {**median, "ratio": ratio, "bar": BAR, "is_within_bar": ratio <= BAR},
    }


def draw(gguf: Path, num_draws: int) -> np.ndarray:
    """Token ids int32 [D, T], of the seeds 0 to D - 1."""
    from puna.checkpoint import open_checkpoint

    vocab_size = open_checkpoint(gguf).spec.vocab_size
    draws = [
        np.random.default_rng(seed).integers(0, vocab_size, NUM_TOKENS, dtype=np.int32)
        for seed in range(num_draws)
    ]
    return np.stack(draws)


def puna(
    gguf: Path,
    engine: Path,
    ids_DT: np.ndarray,
    device: str,
    threads: int,
    *,
    is_exact: bool = False,
) -> tuple[np.ndarray, dict[str, str]]:
    """Logits [D, T, V] of an engine as built by default, or in float32; and what computed them."""
    from puna.builder import build
    from puna.llm import LLM
    from puna.plan import BuildConfig

    exact = BuildConfig(quant="none", dtype="float32", max_seq_len=128)
    config = build(gguf, engine, exact if is_exact else BuildConfig()).config
    with LLM(engine, device=device, threads=threads) as llm:
        logits = [llm.logits(ids.tolist(), num_prefill=NUM_PREFILL) for ids in ids_DT]
        assert llm.session is not None
        name = llm.session.device_name
    return np.stack(logits), {
        "device": name,
        "quant": config.quant,
        "dtype": config.dtype,
        "kv_dtype": config.kv_dtype,
    }


def relative_l2(exact_TV: np.ndarray, found_TV: np.ndarray) -> float:
    error = np.square(found_TV - exact_TV, dtype=np.float64).sum()
    return float((error / np.square(exact_TV, dtype=np.float64).sum()) ** 0.5)


def same_argmax(exact_TV: np.ndarray, found_TV: np.ndarray) -> int:
    """Positions whose likeliest token is the same."""
    return int((exact_TV.argmax(axis=1) == found_TV.argmax(axis=1)).sum())


def table(found: dict[str, Any]) -> str:
    ours, median = found["puna"], found["median"]
    lines = [
        f"{found['model']}: relative L2 error of the logits, against a {found['reference']}",
        f"puna: {ours['device']}, weights {ours['quant']}, dtype {ours['dtype']}, "
        f"KV {ours['kv_dtype']}; peer: {found['peer']}",
        "",
        f"{'draw':<8} {'puna':>9} {'llama.cpp':>10} {'ratio':>6}   same argmax of {NUM_TOKENS}",
    ]
    for row in found["relative_l2"]:
        agree = f"{row['same_argmax_puna']} and {row['same_argmax_llama.cpp']}"
        lines.append(_line(row["draw"], row) + f"   {agree}")
    lines.append(_line("median", median) + f"   bar {BAR}: {_verdict(median)}")
    return "\n".join(lines)


def _line(label: Any, row: dict[str, Any]) -> str:
    return f"{label!s:<8} {row['puna']:>9.2e} {row['llama.cpp']:>10.2e} {row['ratio']:>6.2f}"


def _verdict(median: dict[str, Any]) -> str:
    return "met" if median["is_within_bar"] else "MISSED"


def peer(gguf: Path, threads: int, folder: Path) -> dict[str, str]:
    """llama.cpp's side: logits of ids.npy, as logits.npy. Runs in another interpreter."""
    from peer import Peer  # beside this file, which that interpreter runs as a script

    model = Peer(gguf, threads, context=128, batch=128)
    lc, context, vocab_size = model.lc, model.context, model.vocab_size
    batch = lc.llama_batch_init(NUM_PREFILL, 0, 1)

    def logits(ids: list[int], position: int) -> np.ndarray:
        """Of each of `ids`, which follow what the cache holds."""
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = 1
        status = lc.llama_decode(context, batch)
        assert status == 0, status
        rows = [
            np.ctypeslib.as_array(lc.llama_get_logits_ith(context, i), (vocab_size,)).copy()
            for i in range(len(ids))
        ]
        return np.stack(rows)

    found = []
    for ids in np.load(folder / "ids.npy").tolist():
        model.clear()
        parts = [logits(ids[:NUM_PREFILL], 0)]
        parts += [logits([ids[at]], at) for at in range(NUM_PREFILL, NUM_TOKENS)]
        found.append(np.concatenate(parts))
    np.save(folder / "logits.npy", np.stack(found))
    return {"version": model.version}


if __name__ == "__main__":
    main()
