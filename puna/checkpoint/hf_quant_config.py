"""What a Hugging Face checkpoint says of its quantisation, and which methods puna refuses.

Decides by config files alone. The tensors, which say much of it again, are `hf_quant`'s.
Sources: AutoGPTQ's `BaseQuantizeConfig`, GPTQModel's `QuantizeConfig`, AutoAWQ's `AwqConfig`,
compressed-tensors' `QuantizationConfig`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from puna.checkpoint.fields import Fields, brief, read_json
from puna.errors import CheckpointError

GPTQ, AWQ, COMPRESSED = "gptq", "awq", "compressed-tensors"
BITS = (4, 8)
_CONFIG = "config.json"
# Beside config.json, from before `quantization_config` was there: AutoGPTQ's, and AutoAWQ's.
_OLD_CONFIGS = ("quantize_config.json", "quant_config.json")
_INSTEAD = "the unquantised checkpoint with --quant, or a GGUF file"


@dataclass(frozen=True)
class Quantisation:
    """A method that puna reads. None where the config does not say: then the tensors decide.

    `group_size` 0 is one group a row. `is_v1` says that GPTQ zeros are stored less one,
    `is_act_order` that columns are in groups of which only a tensor tells.
    """

    method: str
    bits: int | None = None
    group_size: int | None = None
    is_v1: bool | None = None
    is_act_order: bool = False


def find_quantisation(directories: Iterable[Path]) -> tuple[Quantisation | None, Path | None]:
    """The first that says how weights were quantised, and its file; None where none does.

    CheckpointError for a method, or a form of one, that puna does not read.
    """
    for directory in directories:
        for name in (_CONFIG, *_OLD_CONFIGS):
            if not (path := directory / name).is_file():
                continue
            fields = read_json(path)
            if name == _CONFIG:
                if not fields.has("quantization_config"):
                    continue
                fields = fields.object("quantization_config")
            return read_quantisation(fields), path
    return None, None


def read_quantisation(config: Fields) -> Quantisation:
    """What a `quantization_config`, or one of the older files, says."""
    is_awq = any(config.has(key) for key in ("w_bit", "q_group_size", "version", "zero_point"))
    is_gptq = config.has("bits") or config.has("desc_act")
    known = AWQ if is_awq else GPTQ if is_gptq else "of unknown method"
    method = config.text("quant_method", config.text("quant_algo", known)).lower()
    if method == GPTQ:
        return _gptq(config)
    if method == AWQ:
        return _awq(config)
    if method in (COMPRESSED, "compressed_tensors"):
        return _compressed(config)
    raise CheckpointError(
        f"{config.where}: the weights are quantised ({brief(method)}), which puna does not read "
        f"(it reads GPTQ, AWQ and compressed-tensors pack-quantized): use {_INSTEAD}"
    )


def _gptq(config: Fields) -> Quantisation:
    form = config.text("checkpoint_format", config.text("format", GPTQ)).lower()
    if config.flag("is_marlin_format", False):
        form = "marlin"
    if form not in (GPTQ, "gptq_v2"):
        raise _other_form(config, "GPTQ", form, "gptq or gptq_v2")
    bits = check_bits(config.whole("bits", None), config.where)
    is_act_order = config.flag("desc_act", False)
    if config.object("dynamic").data:  # other bits and groups for some layers, by regex
        return Quantisation(GPTQ, is_v1=form == GPTQ, is_act_order=is_act_order)
    group_size = _group_size(config, "group_size")
    return Quantisation(GPTQ, bits, group_size, form == GPTQ, is_act_order)


def _awq(config: Fields) -> Quantisation:
    form = config.text("version", config.text("format", "gemm")).lower()
    if form != "gemm":
        raise _other_form(config, "AWQ", form, "gemm")
    bits = check_bits(config.whole("bits", config.whole("w_bit", None)), config.where, (4,))
    key = "group_size" if config.has("group_size") else "q_group_size"
    return Quantisation(AWQ, bits, _group_size(config, key))


def _compressed(config: Fields) -> Quantisation:
    form = config.text("format", "unknown")
    groups = config.object("config_groups")
    schemes = [groups.object(name) for name in groups.data]
    for scheme in schemes:
        found = scheme.text("format", form)
        if found != "pack-quantized":
            raise _other_form(scheme, "compressed-tensors", found, "pack-quantized")
        if scheme.has("input_activations"):
            raise CheckpointError(
                f"{scheme.where}: activations are quantised as well, puna reads weight-only "
                f"schemes (W4A16, W8A16): use {_INSTEAD}"
            )
        weights = scheme.object("weights")
        check_bits(weights.whole("num_bits", None), weights.where)
        if (kind := weights.text("type", "int")) != "int":
            raise _other_form(weights, "compressed-tensors", kind, "int")
    if not schemes and form != "pack-quantized":
        raise _other_form(config, "compressed-tensors", form, "pack-quantized")
    if config.object("transform_config").data:
        raise CheckpointError(
            f"{config.where}: transform_config (rotated weights) is not supported: use {_INSTEAD}"
        )
    if len(schemes) != 1:
        return Quantisation(COMPRESSED)
    weights = schemes[0].object("weights")
    is_act_order = weights.data.get("actorder") in ("group", "dynamic", True)
    is_by_group = weights.text("strategy", "group") == "group"
    group_size = _group_size(weights, "group_size") if is_by_group else None
    bits = weights.whole("num_bits", None)
    return Quantisation(COMPRESSED, bits, group_size, is_act_order=is_act_order)


def check_bits(bits: int | None, where: str, known: tuple[int, ...] = BITS) -> int | None:
    """`bits`, if puna reads weights of so many; CheckpointError otherwise."""
    if bits is None or bits in known:
        return bits
    raise CheckpointError(
        f"{where}: the weights are quantised to {bits} bits, puna reads "
        f"{' and '.join(map(str, known))} bits: use such a checkpoint, or {_INSTEAD}"
    )


def _group_size(config: Fields, key: str) -> int | None:
    """None when absent; 0 for the one group a row that checkpoints write as -1."""
    if config.data.get(key) == -1:
        return 0
    return config.whole(key, None, smallest=1)


def _other_form(config: Fields, method: str, form: str, needed: str) -> CheckpointError:
    return CheckpointError(
        f"{config.where}: {method} weights are in form {brief(form)}, puna reads {needed}: "
        f"use such a checkpoint, or {_INSTEAD}"
    )
