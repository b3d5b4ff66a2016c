"""How far each weight format moves a real model: perplexity, and its logits against float32's.

    python -m benchmarks.accuracy [--device cpu] [--model SmolLM2.gguf] [--text wiki.test.raw]
        [--formats ...]

Convention: the raw text of WikiText-2's test split, encoded in one piece by the model's own
tokenizer without BOS; its first 4,096 tokens in 4 windows of 1,024; each window is predicted from
its own context alone, so 1,023 targets a window. Perplexity is exp of the mean negative
log-likelihood of all 4,092 targets. SmolLM2-135M-Instruct (the GGUF of `puna quickstart`,
dequantised) has 23.1 in float32.

float32, which the others are compared with, runs on the same device as they do. Of the formats,
"auto" is what the checkpoint holds (Q4_1 by default).

Prints a table; --write keeps it in benchmarks/results: accuracy_smollm2_cpu.json of device cpu,
accuracy_smollm2.json of device reference. On the reference, about 80 s a format on one core of a
Xeon with AVX-512, 2026-11. Where the machine is shared, set OPENBLAS_NUM_THREADS=1: two BLAS
threads that wait for each other took five times as long.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import ROOT, about, write
from puna.builder import build
from puna.checkpoint import open_checkpoint
from puna.llm import LLM
from puna.plan import BuildConfig
from puna.tokenizer import load_tokenizer

NUM_TOKENS, WINDOW = 4096, 1024
RESULTS = "accuracy_smollm2"  # of device reference; others add their name
# Name in the table, and what is asked of `puna build`. The first is what the others are held to.
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {"quant": "none", "dtype": "float32"},
    "auto": {"quant": "auto"},
    "float16": {"quant": "none", "dtype": "float16"},
    "bfloat16": {"quant": "none", "dtype": "bfloat16"},
    "int8": {"quant": "int8"},
    "int8-g32": {"quant": "int8", "group_size": 32},
    "int4-g128": {"quant": "int4"},
    "int4-g32": {"quant": "int4", "group_size": 32},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cache = Path.home() / ".cache" / "puna" / "checkpoints"
    parser.add_argument("--model", type=Path, default=cache / "SmolLM2-135M-Instruct.Q4_1.gguf")
    text = ROOT.parent / "shared" / "data" / "wikitext2" / "wiki.test.raw"
    parser.add_argument("--text", type=Path, default=text)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--device", default="auto", help="as of puna run (default: auto)")
    parser.add_argument("--write", action="store_true", help=f"keep results/{RESULTS}*.json")
    args = parser.parse_args()
    names = args.formats.split(",")
    if names[0] != "float32":
        parser.error("--formats must begin with float32, which the others are compared with")

    rows: list[dict[str, Any]] = []
    print(
        f"{'format':<10} {'stored as':<14} {'perplexity':>10} {'% more':>8} {'rel. L2':>9} "
        f"{'KL':>9} {'s':>6}"
    )
    with tempfile.TemporaryDirectory() as folder:
        exact: list[np.ndarray] = []
        for name in names:
            row = measure(name, args.model, args.text, Path(folder), exact, args.device)
            rows.append(row)
            row["percent_more"] = 100 * (row["perplexity"] / rows[0]["perplexity"] - 1)
            print(
                f"{name:<10} {row['stored_as']:<14} {row['perplexity']:>10.4f} "
                f"{row['percent_more']:>+8.3f} {row['relative_l2']:>9.2e} {row['kl']:>9.2e} "
                f"{row['seconds']:>6.0f}",
                flush=True,
            )
    device = rows[0]["device"]
    print(f"device: {device}")
    if args.write:
        kind = device.partition(":")[0]
        name = RESULTS if kind == "reference" else f"{RESULTS}_{kind}"
        record = {"model": args.model.name, "device": device, "results": rows}
        write(name, {**about("accuracy"), **record})


def measure(
    name: str, model: Path, text: Path, folder: Path, exact: list[np.ndarray], device: str = "auto"
) -> dict[str, Any]:
    """One row of the table. `exact` gets float32's logits, or gives them."""
    start = time.perf_counter()
    engine = build_engine(name, model, folder / name)
    nll, kl, error, norm = [], [], 0.0, 0.0
    with LLM(engine, device=device) as llm:
        assert llm.session is not None
        device = llm.session.device_name
        stored_as = llm.config.quant if llm.config.quant != "none" else llm.config.dtype
        for i, ids in enumerate(windows(model, text)):
            logits = llm.logits(ids)
            if len(exact) <= i:
                exact.append(
                    np.lib.format.open_memmap(
                        folder / f"{i}.npy", "w+", shape=logits.shape, dtype=np.float32
                    )
                )
                exact[i][:] = logits
            nll.append(negative_log_likelihood(logits, ids))
            kl.append(kl_divergence(exact[i], logits))
            error += float(np.square(logits - exact[i], dtype=np.float64).sum())
            norm += float(np.square(exact[i], dtype=np.float64).sum())
    return {
        "format": name,
        "stored_as": stored_as,
        "options": FORMATS[name],
        "device": device,
        "perplexity": float(np.exp(np.mean(np.concatenate(nll)))),
        "relative_l2": (error / norm) ** 0.5,
        "kl": float(np.mean(np.concatenate(kl))),
        "seconds": time.perf_counter() - start,
    }


def build_engine(name: str, model: Path, out: Path) -> Path:
    config = BuildConfig(
        **FORMATS[name], max_seq_len=WINDOW, max_batch_size=64, max_num_tokens=WINDOW
    )
    return build(model, out, config).path


def windows(model: Path, text: Path, num_tokens: int = NUM_TOKENS) -> list[list[int]]:
    """The text's first tokens in windows; BOS is not among them."""
    with tempfile.TemporaryDirectory() as folder:
        for file, data in open_checkpoint(model).tokenizer_files().items():
            (Path(folder) / file).write_bytes(data)
        # No token is longer than 20 characters on average, and a cut text only differs at its end.
        ids = load_tokenizer(Path(folder)).encode(text.read_text()[: 20 * num_tokens])
    return [ids[at : at + WINDOW] for at in range(0, num_tokens, WINDOW)]


def log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    shifted_TV = logits_TV - logits_TV.max(axis=1, keepdims=True)
    total_T1 = np.exp(shifted_TV).sum(axis=1, keepdims=True, dtype=np.float64)
    return shifted_TV - np.log(total_T1).astype(np.float32)


def negative_log_likelihood(logits_TV: np.ndarray, ids: list[int]) -> np.ndarray:
    """Of each token but the first, under the logits of the one before it."""
    return -log_softmax(logits_TV[:-1])[np.arange(len(ids) - 1), ids[1:]].astype(np.float64)


def kl_divergence(exact_TV: np.ndarray, found_TV: np.ndarray) -> np.ndarray:
    """KL(exact || found) of each position, in nats."""
    exact, found = log_softmax(exact_TV), log_softmax(found_TV)
    return (np.exp(exact) * (exact - found)).sum(axis=1, dtype=np.float64)


if __name__ == "__main__":
    main()
