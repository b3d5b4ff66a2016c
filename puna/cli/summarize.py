"""`puna summarize`: CNN/DailyMail summaries of an engine (and of transformers), with ROUGE."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.cli.progress import prompt_bar
from puna.cli.run import add_device_options, open_llm
from puna.errors import ConfigError
from puna.runtime.launch import speaks_for_all

if TYPE_CHECKING:
    from puna.summarize import Dataset, RougeScores, SystemResult

HELP = """\
Summarize articles of CNN/DailyMail and compare them with their highlights (ROUGE).

  puna summarize engine --dataset-path test.jsonl
  puna summarize engine --hf-model ./llama-7b --test-hf --data-type bf16
  puna summarize --hf-model ./llama-7b --test-hf                        transformers alone
  puna summarize engine --check-accuracy --rouge1-threshold 14 --json

Without --dataset-path: from ./cnn_dailymail/, else downloaded. docs/summarize.md explains figures.
"""
ROUGE_KEYS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def add_commands(commands: Any, parent: argparse.ArgumentParser) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "summarize",
        help="ROUGE of an engine's summaries of CNN/DailyMail",
        description=HELP,
        parents=[parent],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("engine", nargs="?", metavar="DIR", help="the engine; none with --test-hf: that alone")
    add(
        "--dataset-path",
        "--dataset_path",
        metavar="PATH",
        help="JSONL file (article, highlights), a directory of such, or of the datasets package",
    )
    add("--max-samples", type=int, default=20, metavar="N", help="default: %(default)s")
    add("--output-len", type=int, default=100, metavar="N", help="new tokens (default: 100)")
    add("--batch-size", type=int, metavar="N", help="at once (default: as many as the engine may)")
    add("--num-beams", type=int, default=1, metavar="N", help="default: %(default)s")
    add("--top-k", type=int, default=1, metavar="N", help="1 is greedy (default: 1)")
    add("--hf-model", metavar="DIR", help="Hugging Face checkpoint: its tokenizer, and --test-hf")
    add("--test-hf", action="store_true", help="summarize with transformers too")
    add(
        "--data-type",
        choices=("fp32", "fp16", "bf16"),
        help="of transformers (default: fp16)",
    )
    add("--check-accuracy", action="store_true", help="status 2 when rouge1 is too low")
    add("--rouge1-threshold", type=float, default=15.0, metavar="X", help="default: %(default)s")
    add("--record", action="store_true", help="keep the figures in ENGINE.report.json")
    add("--json", action="store_true", help="one JSON object")
    add_device_options(parser)
    add("--kv-cache-bytes", type=int, metavar="N", help="default: what the engine planned")
    parser.set_defaults(handler=run, chat_template=None, tokenizer=None)


def run(args: argparse.Namespace) -> int:
    from puna.engine import read_config
    from puna.summarize import SummaryOptions, encode_prompts, find_tokenizer, load_samples
    from puna.summarize.rouge import check_rouge, rouge_scores
    from puna.tokenizer import load_tokenizer

    _check_systems(args)
    if not speaks_for_all():
        if args.engine is None:
            return 0
        open_llm(args, max_batch_size=args.batch_size)  # serves rank 0, and ends with it
    # Everything that can be refused is, before the engine is loaded.
    options = SummaryOptions(args.output_len, args.top_k, args.num_beams)
    options.sampling_params()
    check_rouge()
    config = None if args.engine is None else read_config(Path(args.engine))
    folder, tokenizer_note = find_tokenizer(args.hf_model, args.engine)
    tokenizer = load_tokenizer(folder)
    dataset = load_samples(args.dataset_path, args.max_samples)
    notes = [note for note in (_data_type_note(args), dataset.note, tokenizer_note) if note]
    if notes and not args.quiet:
        print(f"note: {'; '.join(notes)}", file=sys.stderr)
    max_seq_len = None if config is None else config.limits.max_seq_len
    prompts = encode_prompts(tokenizer, dataset.samples, max_seq_len, options.output_len)

    args.tokenizer = str(folder)
    device, results = _run_systems(args, tokenizer, prompts, options)
    references = [sample.highlights for sample in dataset.samples]
    scores = [rouge_scores(result.summaries, references) for result in results]
    report = _report(args, device, dataset, results, scores)
    if args.json:
        print(json.dumps(report))
    else:
        _print_report(dataset, results, scores)
    if args.record and args.engine is not None:
        from puna.report import append_record, new_record

        texts = ("article", "highlights", "summaries")
        figures = {key: value for key, value in report.items() if key not in texts}
        digest = read_config(Path(args.engine)).digest()
        record = new_record("summarize", args.command_line, digest, figures)
        print(f"note: recorded in {append_record(args.engine, record)}", file=sys.stderr)
    if args.check_accuracy and scores[0].rouge1 < args.rouge1_threshold:
        raise ConfigError(
            f"rouge1 is {scores[0].rouge1:.2f}, below the threshold {args.rouge1_threshold:g}: "
            "look at the summaries, or lower --rouge1-threshold"
        )
    return 0


def _check_systems(args: argparse.Namespace) -> None:
    """ConfigError for options that contradict each other about who is to summarize."""
    from puna.summarize.transformers_model import check_model_dir

    if args.engine is None:
        if not args.test_hf:
            raise ConfigError("nothing is to summarize: name an engine, or --test-hf, or both")
        for option, value in (("--record", args.record), ("--check-accuracy", args.check_accuracy)):
            if value:
                raise ConfigError(f"{option} is about an engine: name one, or leave it out")
    if not args.test_hf:
        return
    if args.hf_model is None:
        raise ConfigError("--test-hf needs --hf-model DIR, a Hugging Face checkpoint")
    if args.top_k != 1:
        raise ConfigError("--test-hf compares greedy summaries: leave out --top-k")
    check_model_dir(args.hf_model)


def _data_type_note(args: argparse.Namespace) -> str | None:
    if args.data_type is None or args.test_hf:
        return None
    return "the data type is for transformers (--test-hf); the engine has its own"


def _run_systems(
    args: argparse.Namespace, tokenizer: Any, prompts: list[list[int]], options: Any
) -> tuple[str, list[SystemResult]]:
    """The device, and what each made of the prompts: the engine, then transformers, whichever are
    asked for; one of them in memory at a time."""
    from puna.summarize import summarize_with_llm, summarize_with_transformers
    from puna.summarize.systems import eos_token_ids

    results: list[SystemResult] = []
    device, batch_size, eos = "cpu", args.batch_size or 1, tokenizer.eos_token_ids
    if args.engine is not None:
        with open_llm(args, max_batch_size=args.batch_size) as llm:
            assert llm.session is not None
            device = llm.session.device
            batch_size = args.batch_size or llm.config.limits.max_batch_size
            eos = eos_token_ids(llm, tokenizer)
            with prompt_bar("summarizing", args.quiet) as progress:
                results.append(summarize_with_llm(llm, tokenizer, prompts, options, progress))
    if args.test_hf:
        with prompt_bar("transformers", args.quiet) as progress:
            theirs = summarize_with_transformers(
                args.hf_model,
                tokenizer,
                prompts,
                options,
                eos=eos,
                data_type=args.data_type or "fp16",
                batch_size=batch_size,
                device="cuda" if device.startswith("cuda") else "cpu",
                progress=progress,
            )
        results.append(theirs)
    return device, results


def _report(
    args: argparse.Namespace,
    device: str,
    dataset: Dataset,
    results: list[SystemResult],
    scores: list[RougeScores],
) -> dict[str, Any]:
    first = dataset.samples[0]
    return {
        "engine": args.engine,
        "device": device,
        "dataset": dataset.source,
        "num_samples": len(dataset.samples),
        "output_len": args.output_len,
        "batch_size": args.batch_size,
        "num_beams": args.num_beams,
        "top_k": args.top_k,
        "data_type": (args.data_type or "fp16") if args.test_hf else None,
        "article": first.article,
        "highlights": first.highlights,
        "summaries": {result.name: result.summaries[0] for result in results},
        "systems": {
            result.name: {
                "seconds": round(result.seconds, 6),
                "num_tokens": result.num_tokens,
                "tok_s": round(result.tok_s, 3),
                **{key: round(value, 4) for key, value in asdict(score).items()},
            }
            for result, score in zip(results, scores, strict=True)
        },
    }


def _print_report(dataset: Dataset, results: list[SystemResult], scores: list[RougeScores]) -> None:
    first = dataset.samples[0]
    print(f"Article: {first.article}\n\nHighlights: {first.highlights}")
    for result in results:
        print(f"\nSummary ({result.name}): {result.summaries[0]}")
    for result, score in zip(results, scores, strict=True):
        print(f"\n{result.name}, samples: {len(result.summaries)}")
        print(f"  total latency  {result.seconds:,.2f} s")
        print(f"  tokens/s       {result.tok_s:,.1f}")
        for name in ROUGE_KEYS:
            print(f"  {name:<13}  {getattr(score, name):.2f}")
