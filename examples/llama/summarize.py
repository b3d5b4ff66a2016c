"""summarize.py: ROUGE on CNN/DailyMail, with the flags of the LLaMA guide.

Decides what the flags are to `puna summarize`, which does the work.
"""

from __future__ import annotations

import sys

from flags import Flags, Parser

from puna.cli import exit_status, main
from puna.errors import ConfigError

DESCRIPTION = """\
Summaries of CNN/DailyMail by an engine, by Hugging Face transformers, or by both, and their ROUGE.

  python summarize.py --test_trt_llm --hf_model_location ./tmp/llama/7B/ --data_type fp16 \\
                      --engine_dir ./tmp/llama/7B/trt_engines/fp16/1-gpu/
"""
DEFAULTS = {
    "log_level": "info", "engine_dir": "llama_outputs", "max_ite": 20,
    "tensorrt_llm_rouge1_threshold": 15.0, "num_beams": 1, "top_k": 1, "output_len": 100,
}  # fmt: skip


def parser() -> Parser:
    parser = Parser(DESCRIPTION)
    add = parser.add_argument
    add("--test_trt_llm", action="store_true", help="summarize with the engine")
    add("--test_hf", action="store_true", help="summarize with transformers")
    add(
        "--hf_model_location",
        metavar="DIR",
        help="the tokenizer, there or in its hf/ (else the engine's), and the model of --test_hf",
    )
    add("--engine_dir", metavar="DIR", help="default: llama_outputs")
    add("--data_type", choices=("fp32", "fp16", "bf16"), help="of transformers (fp16)")
    add(
        "--dataset_path",
        metavar="PATH",
        help="JSONL file, directory or cache (./cnn_dailymail/ if it is there, else a download)",
    )
    parser.add_log_level(str(DEFAULTS["log_level"]))
    add(
        "--batch_size",
        type=int,
        metavar="N",
        help="at once; not given: 1 in transformers, and in the engine as many as it has room for",
    )
    add("--max_ite", type=int, metavar="N", help="samples / batch_size, or samples without it (20)")
    add("--check_accuracy", action="store_true", help="fail where rouge1 is below the threshold")
    add("--tensorrt_llm_rouge1_threshold", type=float, metavar="X", help="default: 15")
    add("--num_beams", type=int, metavar="N", help="default: 1")
    add("--top_k", type=int, metavar="N", help="default: 1, greedy")
    add("--output_len", type=int, metavar="N", help="new tokens (100)")
    parser.add_master()
    return parser


def arguments(flags: Flags) -> list[str]:
    """The command line of `puna summarize`."""
    if "tensorrt_llm_rouge1_threshold" in flags and "check_accuracy" not in flags:
        raise ConfigError("--tensorrt_llm_rouge1_threshold needs --check_accuracy: give both")
    found: list[object] = []
    if "test_trt_llm" in flags:
        found.append(flags["engine_dir"])
        if "check_accuracy" in flags:
            found += ["--check-accuracy"]
            found += ["--rouge1-threshold", flags["tensorrt_llm_rouge1_threshold"]]
    elif "check_accuracy" in flags:
        raise ConfigError("--check_accuracy is about the engine: give --test_trt_llm too")
    elif "test_hf" not in flags:
        raise ConfigError("nothing is to summarize: give --test_trt_llm, --test_hf, or both")
    if "test_hf" in flags:
        found.append("--test-hf")
    for name, option in (
        ("hf_model_location", "--hf-model"),
        ("dataset_path", "--dataset-path"),
        ("batch_size", "--batch-size"),
        ("data_type", "--data-type"),
        ("master_addr", "--master-addr"),
        ("master_port", "--master-port"),
    ):
        if name in flags:
            found += [option, flags[name]]
    for name in ("num_beams", "top_k", "output_len"):
        found += [f"--{name.replace('_', '-')}", flags[name]]
    found += ["--max-samples", flags["max_ite"] * (flags["batch_size"] or 1)]
    found += [] if flags.is_talkative else ["--quiet"]
    return ["summarize", *map(str, found)]


def run(flags: Flags) -> int:
    return main(arguments(flags))


if __name__ == "__main__":
    sys.exit(exit_status(lambda: run(Flags(parser(), DEFAULTS))))
