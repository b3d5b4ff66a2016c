"""Quantised linear layers of Hugging Face checkpoints: GPTQ, AWQ and pack-quantized, exactly.

Decides which tensors make a layer and where its integers, zeros and scales lie in them; bits and
groups follow from shapes, and must agree with the config where that names them. Knows no models.

Of a layer of N outputs and K inputs, with P = 32 / bits numbers a word and G groups:

- GPTQ (AutoGPTQ's `QuantLinear.pack`): `qweight` [K/P, N], words of consecutive inputs; `qzeros`
  [G, N/P], words of consecutive outputs; `scales` [G, N]; `g_idx` [K], the group of each input.
  Version 1 stores zeros less one. It is subtracted from, and added to, whole words by GPTQModel
  (`convert_gptq_v1_to_v2_format`), so that a zero of 0 borrows from its neighbour and is repaid.
- AWQ (AutoAWQ's `WQLinear_GEMM`): `qweight` [K, N/8] and `qzeros` [G, N/8], words of eight outputs
  of which field i is output `_AWQ_ORDER[i]`; `scales` [G, N].
- compressed-tensors' `pack_to_int32`: `weight_packed` [N, K/P], words of consecutive inputs;
  `weight_scale` [N, G]; `weight_zero_point` [N/P, G], words of consecutive outputs, absent where
  symmetric; `weight_shape` holds N, K; `weight_g_idx` [K], all -1 where there is no act order.
  Integers and zeros are signed and stored plus 2^(bits - 1), which cancels out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from puna.checkpoint.fields import brief
from puna.checkpoint.hf_quant_config import AWQ, BITS, COMPRESSED, GPTQ, Quantisation, check_bits
from puna.checkpoint.packed_ints import PackedInts
from puna.checkpoint.packed_linear import PackedLinear
from puna.checkpoint.stored import DenseTensor
from puna.errors import CheckpointError
from puna.quant import DTYPES, Array

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_SUFFIXES = MappingProxyType(
    {
        "qweight": ("qweight", "qzeros", "scales", "g_idx"),
        "weight_packed": (
            *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"),
            "weight_g_idx",
        ),
    }
)


def take_layers(tensors: dict[str, DenseTensor]) -> dict[str, dict[str, DenseTensor]]:
    """Move the tensors of quantised layers out of `tensors`: by layer, then by last name."""
    layers: dict[str, dict[str, DenseTensor]] = {}
    for name in list(tensors):
        layer, _, last = name.rpartition(".")
        if layer and last in _SUFFIXES:
            names = {suffix: f"{layer}.{suffix}" for suffix in _SUFFIXES[last]}
            found = {suffix: tensors.pop(n) for suffix, n in names.items() if n in tensors}
            layers[layer] = layers.get(layer, {}) | found
    return layers


def guess_quantisation(layers: Mapping[str, Mapping[str, DenseTensor]]) -> Quantisation:
    """The method that the tensors look like, for checkpoints whose config does not say."""
    first = next(iter(layers.values()))
    if "weight_packed" in first:
        return Quantisation(COMPRESSED)
    shapes = [first[s].shape for s in ("qweight", "scales") if s in first]
    is_awq = len(shapes) == 2 and len(shapes[0]) == 2 and shapes[0][1] * 8 == shapes[1][-1]
    return Quantisation(AWQ if is_awq else GPTQ)


def quantised_linear(
    name: str, tensors: Mapping[str, DenseTensor], quantisation: Quantisation
) -> PackedLinear:
    """The layer `name`; CheckpointError where its tensors make none, or not the config's."""
    layer = _Layer(name, tensors, quantisation)
    linear = {GPTQ: _gptq, AWQ: _awq, COMPRESSED: _compressed}[quantisation.method](layer)
    if linear.zeros and linear.zeros.holds_only(2 ** (linear.q.bits - 1)):
        linear = replace(linear, zeros=None)
    return linear


def inexact_notes(linears: Iterable[PackedLinear]) -> list[str]:
    """What a user should know of layers that no puna format holds."""
    counts: Counter[tuple[str, str]] = Counter()
    for linear in linears:
        if not linear.is_exact:
            is_ordered = linear.groups_K is None
            how = f"in groups of {linear.group_size}" if is_ordered else "in act order"
            counts[how, linear.format.name] += 1
    return [
        f"{count} layers quantised {how} have no exact form in puna: dequantised to {dtype}"
        for (how, dtype), count in counts.items()
    ]


@dataclass(frozen=True)
class _Layer:
    """Checked access to a layer's tensors."""

    name: str
    tensors: Mapping[str, DenseTensor]
    said: Quantisation

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: {what}; download it again, or mend its config")

    def has(self, suffix: str) -> bool:
        return suffix in self.tensors

    def array(self, suffix: str, num_axes: int) -> Array:
        if suffix not in self.tensors:
            raise self.wrong(f"{self.said.method} needs {suffix}, which is missing")
        array = self.tensors[suffix].parts[0]
        if array.ndim != num_axes or not array.size:
            raise self.wrong(f"{suffix} is {brief(list(array.shape))}; needed {num_axes} axes")
        return array

    def words(self, suffix: str) -> Array:
        """uint32, of the file's two axes."""
        array = self.array(suffix, 2)
        if array.dtype != np.int32:
            label = self.tensors[suffix].label
            raise self.wrong(f"{suffix} has type {label}; needed 32-bit integers")
        return array.view(np.uint32)

    def scales(self, suffix: str) -> Array:
        array = self.array(suffix, 2)
        if array.dtype not in DTYPES.values():
            label = self.tensors[suffix].label
            raise self.wrong(f"{suffix} has type {label}; needed F16, BF16 or F32")
        return array

    def check(self, suffix: str, *needed: int) -> None:
        if (shape := self.tensors[suffix].shape) != needed:
            raise self.wrong(f"{suffix} is {list(shape)}; the others make it {list(needed)}")

    def bits(self, num_words: int, size: int) -> int:
        """How many bits each of `size` numbers has in `num_words` words."""
        fitting = [b for b in range(1, 17) if -(-size * b // 32) == num_words]
        said = self.said.bits
        if said in fitting:
            return said
        if said or not fitting:
            found = f"{said} bits make {-(-size * said // 32)}" if said else "no bits do"
            raise self.wrong(f"{num_words} words hold {size} numbers, {found}")
        known = [b for b in fitting if b in BITS]
        bits = check_bits(known[0] if known else fitting[0], self.name)
        assert bits is not None
        return bits

    def group_size(self, num_cols: int, num_groups: int) -> int:
        """Columns a group, 0 for one group; the last may be shorter where the config says so."""
        said = self.said.group_size
        if num_groups == 1 and (not said or said >= num_cols):
            return 0
        if said is None and num_cols % num_groups == 0:
            return num_cols // num_groups
        if not said or -(-num_cols // said) != num_groups:
            what = "" if said is None else f" in groups of {said or num_cols}"
            raise self.wrong(f"{num_groups} scales a row for {num_cols} columns{what}")
        return said

    def grouped(self, suffix: str, num_cols: int, num_groups: int) -> tuple[int, Array | None]:
        """Group size, and each column's group where columns are in act order."""
        if num_groups > 1 and self.said.is_act_order and not self.has(suffix):
            raise self.wrong(f"act order needs {suffix}, which is missing")
        if num_groups == 1 or not self.has(suffix):
            return self.group_size(num_cols, num_groups), None
        groups_K = self.array(suffix, 1)
        self.check(suffix, num_cols)
        if groups_K.dtype not in (np.int32, np.int64):
            raise self.wrong(f"{suffix} has type {self.tensors[suffix].label}; needed integers")
        if suffix == "weight_g_idx" and (groups_K == -1).all():
            return self.group_size(num_cols, num_groups), None
        if groups_K.min() < 0 or groups_K.max() >= num_groups:
            raise self.wrong(f"{suffix} names groups beyond the {num_groups} that have scales")
        size = int((groups_K == 0).sum())
        if size and np.array_equal(groups_K, np.arange(num_cols) // size):
            if self.said.group_size not in (None, size):
                raise self.wrong(f"{suffix} has groups of {size}, not {self.said.group_size}")
            return size, None
        return 0, groups_K


def _gptq(layer: _Layer) -> PackedLinear:
    q, zeros, scales = layer.words("qweight"), layer.words("qzeros"), layer.scales("scales")
    num_groups, num_rows = scales.shape
    bits = layer.bits(zeros.shape[1], num_rows)
    a_word = 32 // bits
    num_cols = len(layer.array("g_idx", 1)) if layer.has("g_idx") else q.shape[0] * a_word
    layer.check("qweight", -(-num_cols // a_word), num_rows)
    layer.check("qzeros", num_groups, -(-num_rows // a_word))
    group_size, groups_K = layer.grouped("g_idx", num_cols, num_groups)
    stored = PackedInts(zeros, bits, num_rows, is_by_column=True)
    one = 0xFFFFFFFF // (2**bits - 1)  # in every field
    is_v1 = layer.said.is_v1
    if is_v1 is None:  # zeros that are all in the middle as they stand are those of version 2
        is_v1 = not stored.holds_only(2 ** (bits - 1))
    return PackedLinear(
        shape=(num_rows, num_cols),
        q=PackedInts(q.T, bits, num_cols),
        zeros=replace(stored, added=one) if is_v1 else stored,
        scale_NG=scales.T,
        group_size=group_size,
        groups_K=groups_K,
    )


def _awq(layer: _Layer) -> PackedLinear:
    q, zeros, scales = layer.words("qweight"), layer.words("qzeros"), layer.scales("scales")
    num_groups, num_rows = scales.shape
    num_cols = q.shape[0]
    layer.check("qweight", num_cols, num_rows // 8)
    layer.check("qzeros", num_groups, num_rows // 8)
    if num_rows % 8:
        raise layer.wrong(f"scales has {num_rows} columns; AWQ needs a multiple of 8")
    return PackedLinear(
        shape=(num_rows, num_cols),
        q=PackedInts(q, 4, num_rows, is_by_column=True, order=_AWQ_ORDER),
        zeros=PackedInts(zeros, 4, num_rows, is_by_column=True, order=_AWQ_ORDER),
        scale_NG=scales.T,
        group_size=layer.group_size(num_cols, num_groups),
    )


def _compressed(layer: _Layer) -> PackedLinear:
    q, scales = layer.words("weight_packed"), layer.scales("weight_scale")
    shape = layer.array("weight_shape", 1)
    if shape.dtype not in (np.int32, np.int64) or len(shape) != 2 or shape.min() < 1:
        raise layer.wrong(f"weight_shape holds {brief(shape.tolist())}; needed rows and columns")
    num_rows, num_cols = (int(n) for n in shape)
    bits = layer.bits(q.shape[1], num_cols)
    a_word, num_groups = 32 // bits, scales.shape[1]
    layer.check("weight_packed", num_rows, -(-num_cols // a_word))
    layer.check("weight_scale", num_rows, num_groups)
    group_size, groups_K = layer.grouped("weight_g_idx", num_cols, num_groups)
    zeros = None
    if layer.has("weight_zero_point"):
        words = layer.words("weight_zero_point")
        layer.check("weight_zero_point", -(-num_rows // a_word), num_groups)
        zeros = PackedInts(words.T, bits, num_rows, is_by_column=True)
    return PackedLinear(
        (num_rows, num_cols), PackedInts(q, bits, num_cols), zeros, scales, group_size, groups_K
    )
