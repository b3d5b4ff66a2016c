"""FusedDecode: the kernels of sm_90 for one token (csrc/decode_sm90.cu) as operations.

Decides nothing but what they are given. Every kernel is launched programmatically: it begins while
those before it end, and waits for them itself.

Shape suffixes as in `puna.cuda.ops`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from puna.batch import ForwardBatch
from puna.cuda.driver import Driver, TensorMap
from puna.cuda.interfaces import Kernels
from puna.cuda.maps import FusedMaps
from puna.cuda.shapes import FusedShapes
from puna.ops import LayerCache, Norm, RopeTable, Stream

Tensor = Any

# A tag is (number of the step, number of the launch within it): a layer's among so many.
MAX_LAYERS = 1024


@dataclass(frozen=True, slots=True)
class _Projection:
    """What `qkv` was given, until `attention`, which is a part of the same kernel."""

    norm: Norm
    weight_XK: Tensor
    bias_N: Tensor | None
    rope: RopeTable


class FusedDecode:
    """The fused operations over a session's workspace. `num_ctas`: multiprocessors of the GPU."""

    operations = frozenset(("qkv", "attention", "gate_up", "down", "head"))

    def __init__(
        self,
        shapes: FusedShapes,
        kernels: Kernels,
        driver: Driver,
        arrays: dict[str, Tensor],
        num_ctas: int,
    ) -> None:
        assert num_ctas <= len(arrays["fused_best"]), num_ctas
        self._kernels = kernels
        self._arrays = arrays
        self._num_ctas = num_ctas
        self._projection: _Projection | None = None
        self._num_layers = 0  # recorded so far; neighbours in a step have different numbers
        self._maps = FusedMaps(shapes, driver)

    def qkv(
        self,
        x: Stream,
        norm: Norm,
        weight_XK: Tensor,
        bias_N: Tensor | None,
        rope: RopeTable,
        batch: ForwardBatch,
        cache: LayerCache,
        q_TQ: Tensor,
    ) -> None:
        assert self._projection is None, "attention follows its projection"
        self._projection = _Projection(norm, weight_XK, bias_N, rope)

    def attention(
        self,
        q_TQ: Tensor,
        batch: ForwardBatch,
        cache: LayerCache,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        x: Stream,
    ) -> None:
        projection, self._projection = self._projection, None
        assert projection is not None, "attention follows its projection"
        assert len(x.residual_TD) == 1, len(x.residual_TD)
        arrays = self._arrays
        attended_TQ = arrays["attended_TQ"]
        self._num_layers = (self._num_layers + 1) % MAX_LAYERS
        self._launch(
            "qkv",
            self._maps.weight("qkv", projection.weight_XK),
            self._bias(projection.bias_N),
            x.residual_TD,
            projection.norm.weight_D,
            projection.rope.cos_PE,
            projection.rope.sin_PE,
            batch.positions_T,
            batch.slots_T,
            batch.seq_lens_S,
            batch.block_table_SM,
            cache.keys_NKEP,
            cache.values_NKPE,
            self._maps.cache(cache.keys_NKEP),
            self._maps.cache(cache.values_NKPE),
            attended_TQ,
            *(arrays[f"fused_{it}"] for it in ("part", "fresh", "epoch", "split_count", "error")),
            self._num_layers,
        )
        weight, bias = self._maps.weight("out", weight_NK), self._bias(bias_N)
        self._launch("out", weight, bias, attended_TQ, x.residual_TD)

    def out(self, attended_TQ: Tensor, weight_NK: Tensor, bias_N: Tensor | None, x: Stream) -> None:
        raise AssertionError("a part of attention here")

    def gate_up(
        self, x: Stream, norm: Norm, weight_XK: Tensor, bias_N: Tensor | None, act_TF: Tensor
    ) -> None:
        weight, bias = self._maps.weight("gate_up", weight_XK), self._bias(bias_N)
        self._launch("gate_up", weight, bias, x.residual_TD, norm.weight_D, act_TF)

    def down(self, act_TF: Tensor, weight_NK: Tensor, bias_N: Tensor | None, x: Stream) -> None:
        weight, bias = self._maps.weight("down", weight_NK), self._bias(bias_N)
        self._launch("down", weight, bias, act_TF, x.residual_TD)

    def head(
        self, x: Stream, rows_L: Tensor, norm: Norm, weight_NK: Tensor, logits_LV: Tensor
    ) -> None:
        arrays = self._arrays
        self._launch(
            "head",
            self._maps.weight("head", weight_NK),
            x.residual_TD,
            norm.weight_D,
            rows_L,
            logits_LV,
            arrays["fused_best"],
            arrays["fused_epoch"],
        )

    def sample_greedy(self, rows_L: Tensor, last_tokens_R: Tensor, out_tokens_L: Tensor) -> None:
        best, error = self._arrays["fused_best"], self._arrays["fused_error"]
        arguments = (best, rows_L, last_tokens_R, out_tokens_L, error, self._num_ctas)
        self._kernels.launch("pick_1", (1, 1, 1), arguments, True)

    def finish(self) -> None:
        """Nothing is held back."""

    def _launch(self, kernel: str, *arguments: Tensor | TensorMap | int) -> None:
        self._kernels.launch(f"{kernel}_1", (self._num_ctas, 1, 1), arguments, True)

    def _bias(self, bias_N: Tensor | None) -> Tensor:
        """The bias, or what stands for it where the kernel reads none."""
        return self._arrays["rope_cos_PE"] if bias_N is None else bias_N
