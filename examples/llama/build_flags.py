"""The flags of build.py: which there are, which are only accepted or refused, which exclude others.

What the rest of them do is in build.py.
"""

from __future__ import annotations

from flags import DTYPES, Flags, Parser

from puna.errors import ConfigError

DESCRIPTION = """\
A checkpoint to an engine, with the flags of the LLaMA guide.

  python build.py --model_dir ./tmp/llama/7B/ --dtype float16 --output_dir ./tmp/llama/7B/engine
  python build.py --meta_ckpt_dir ./tmp/llama/70B --world_size 8 --output_dir ./tmp/llama/70B/engine
"""
DEFAULTS = {
    "pp_size": 1, "target": "auto", "dtype": "float16", "log_level": "info",
    "output_dir": "llama_outputs",
    "vocab_size": 32000, "n_layer": 32, "n_positions": 2048, "n_embd": 4096, "n_head": 32,
    "multiple_of": 256, "ffn_dim_multiplier": 1.0, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rotary_base": 10000.0, "max_batch_size": 8, "max_input_len": 2048, "max_output_len": 512,
    "max_beam_width": 1, "weight_only_precision": "int8", "group_size": 128,
}  # fmt: skip
PLUGINS = ("use_gpt_attention_plugin", "use_gemm_plugin", "use_rmsnorm_plugin")

_ATTENTION = "attention is always fused, sums in float32 and divides long contexts"
_ALWAYS = "always so"
_TUNING = "kernels come tuned, a build times nothing"
_EMBEDDING = "the embedding is always divided over the ranks, by vocabulary"
NOTES = {
    **dict.fromkeys(PLUGINS, "puna has kernels of its own"),
    "enable_context_fmha": _ATTENTION,
    "enable_context_fmha_fp32_acc": _ATTENTION,
    "multi_block_mode": _ATTENTION,
    "remove_input_padding": _ALWAYS,
    "paged_kv_cache": _ALWAYS,
    "use_inflight_batching": _ALWAYS,
    "strongly_typed": _ALWAYS,
    "tokens_per_block": "blocks of the KV cache have 16 tokens, on a GPU 64",
    "use_custom_all_reduce": "how ranks exchange is decided when the engine is run",
    "use_parallel_embedding": _EMBEDDING,
    "embedding_sharding_dim": _EMBEDDING,
    "load_by_shard": "weights are always read a slice at a time",
    "timing_cache": _TUNING,
    "builder_opt": _TUNING,
    "gpus_per_node": "the launcher says which ranks share a host",
}
_FP8 = "for weights use --use_weight_only (int8), for the KV cache --int8_kv_cache"
_SMOOTH = "use --use_weight_only: int8 weights, which on CPUs meet int8 activations anyway"
REFUSED = {
    "ft_model_dir": "give the checkpoint that it was made from, by --model_dir or --meta_ckpt_dir",
    "enable_fp8": _FP8,
    "fp8_kv_cache": _FP8,
    "quantized_fp8_model_path": _FP8,
    "use_smooth_quant": _SMOOTH,
    "per_channel": _SMOOTH,
    "per_token": _SMOOTH,
    "enable_debug_output": "compare with --device reference (puna run), or LLM.logits in Python",
    "visualize": "there is no graph to draw; puna inspect shows what an engine holds",
}


def parser() -> Parser:
    parser = Parser(DESCRIPTION)
    add = parser.add_argument
    for name, text in (
        ("model_dir", "Hugging Face checkpoint (or GGUF); without any: dummy weights"),
        ("meta_ckpt_dir", "Meta checkpoint: params.json, consolidated.NN.pth"),
        ("ft_model_dir", "refused"),
        ("output_dir", "the engine to make; one that is there is replaced (llama_outputs)"),
    ):
        add(f"--{name}", metavar="DIR", help=text)
    add(
        "--quant_ckpt_path",
        "--quant_safetensors_path",
        metavar="FILE",
        help="GPTQ or AWQ weights of the model in --model_dir",
    )
    add("--dtype", choices=DTYPES, help="default: float16")
    add("--world_size", type=int, metavar="N", help="ranks: tp_size x pp_size (1)")
    add("--tp_size", type=int, metavar="N", help="tensor parallel (world_size / pp_size)")
    add("--pp_size", type=int, metavar="N", help="pipeline stages (1)")
    add("--parallel_build", action="store_true", help="a process a rank")
    add(
        "--target",
        metavar="NAME",
        help="not the guide's: cpu, or a GPU as puna build has them (auto: the one here, or cpu)",
    )
    parser.add_log_level(str(DEFAULTS["log_level"]))

    shape = parser.add_argument_group("shape of a model without a checkpoint (default)")
    for name in ("vocab_size", "n_layer", "n_positions", "n_embd", "n_head", "multiple_of"):
        shape.add_argument(f"--{name}", type=int, metavar="N", help=str(DEFAULTS[name]))
    shape.add_argument("--n_kv_head", type=int, metavar="N", help="n_head")
    shape.add_argument("--inter_size", type=int, metavar="N", help="from the two multiples")
    for name in ("ffn_dim_multiplier", "rms_norm_eps", "rotary_base"):
        shape.add_argument(f"--{name}", type=float, metavar="X", help=str(DEFAULTS[name]))
    shape.add_argument("--hidden_act", metavar="NAME", help="silu")
    shape.add_argument(
        "--rotary_scaling",
        nargs=2,
        metavar=("TYPE", "FACTOR"),
        help="linear or dynamic; also of a checkpoint that has none",
    )

    limits = parser.add_argument_group("limits (default)")
    for name in ("max_batch_size", "max_input_len", "max_output_len", "max_beam_width"):
        limits.add_argument(f"--{name}", type=int, metavar="N", help=str(DEFAULTS[name]))
    limits.add_argument(
        "--max_num_tokens", type=int, metavar="N", help="of a step (512, on a GPU 2048)"
    )

    quant = parser.add_argument_group("quantisation")
    quant.add_argument("--use_weight_only", action="store_true", help="integer weights")
    quant.add_argument(
        "--weight_only_precision", choices=("int8", "int4", "int4_awq", "int4_gptq"), help="int8"
    )
    quant.add_argument("--per_group", action="store_true", help="a scale a group")
    quant.add_argument("--group_size", type=int, metavar="N", help="with --per_group (128)")
    quant.add_argument("--int8_kv_cache", action="store_true")

    needless = parser.add_argument_group("accepted: what puna does instead is said in a note")
    for name in NOTES:
        if name in PLUGINS:
            needless.add_argument(f"--{name}", nargs="?", const=None, choices=DTYPES)
        elif name in ("tokens_per_block", "embedding_sharding_dim", "builder_opt", "gpus_per_node"):
            needless.add_argument(f"--{name}", type=int, metavar="N")
        elif name == "timing_cache":
            needless.add_argument(f"--{name}", metavar="FILE")
        else:
            needless.add_argument(f"--{name}", action="store_true")
    refused = parser.add_argument_group("refused, with what to use instead")
    for name in REFUSED:
        if name == "quantized_fp8_model_path":
            refused.add_argument(f"--{name}", metavar="FILE")
        elif name != "ft_model_dir":
            refused.add_argument(f"--{name}", action="store_true")
    return parser


def check_flags(flags: Flags) -> None:
    """ConfigError for what is refused, and for flags that contradict each other."""
    flags.exclude("use_weight_only", "use_smooth_quant")
    flags.refuse(REFUSED)
    flags.exclude("model_dir", "meta_ckpt_dir")
    flags.exclude("meta_ckpt_dir", "quant_ckpt_path")
    flags.exclude("enable_context_fmha", "enable_context_fmha_fp32_acc")
    for name, needed in (
        ("weight_only_precision", "use_weight_only"),
        ("per_group", "use_weight_only"),
        ("group_size", "per_group"),
        ("quant_ckpt_path", "model_dir"),
    ):
        if name in flags and needed not in flags:
            raise ConfigError(f"--{name} needs --{needed}: give both, or neither")
    for name in PLUGINS:
        if flags[name] not in (None, flags["dtype"]):
            raise ConfigError(
                f"--{name} {flags[name]} contradicts --dtype {flags['dtype']}: an engine computes "
                "in one dtype"
            )
    if flags["hidden_act"] not in ("silu", "swish"):
        raise ConfigError(f"--hidden_act {flags['hidden_act']}: LLaMA's is silu, the only one here")
