"""FusedDecode: the fused kernels of sm_90 (csrc/decode_sm90.cu) as operations.

Decides nothing but which of the compiled variants runs and with what. Every kernel is launched
programmatically: it begins while those before it end, and waits for them itself.

Shape suffixes as in `puna.cuda.ops`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from puna.batch import ForwardBatch
from puna.cuda.driver import Driver, TensorMap
from puna.cuda.fused_plan import CACHE_BOX, FUSED_ROWS, FusedShapes, tile_rows, weight_box
from puna.cuda.library import Library
from puna.ops import LayerCache, Norm, RopeTable, Stream

Tensor = Any

# A tag is (number of the step, number of the launch within it): a layer's among so many.
_MAX_LAYERS = 1024


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
        library: Library,
        driver: Driver,
        arrays: dict[str, Tensor],
        num_ctas: int,
    ) -> None:
        assert num_ctas <= len(arrays["fused_best"]), num_ctas
        self._shapes = shapes
        self._library = library
        self._driver = driver
        self._arrays = arrays
        self._num_ctas = num_ctas
        self._projection: _Projection | None = None
        self._num_layers = 0  # recorded so far; neighbours in a step have different numbers
        self._variant = 1  # of the head recorded last
        self._maps: dict[tuple[str, int], TensorMap] = {}  # by kernel and address

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
        arrays, num_rows = self._arrays, len(x.residual_TD)
        attended_TQ = arrays["attended_TQ"]
        self._num_layers = (self._num_layers + 1) % _MAX_LAYERS
        self._launch(
            "qkv",
            num_rows,
            self._map("qkv", num_rows, projection.weight_XK),
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
            self._cache_map(cache.keys_NKEP),
            self._cache_map(cache.values_NKPE),
            attended_TQ,
            arrays["fused_part"],
            arrays["fused_fresh"],
            arrays["fused_epoch"],
            arrays["fused_split_count"],
            arrays["fused_error"],
            batch.block_table_SM.shape[1],
            num_rows,
            self._num_layers,
        )
        bias = self._bias(bias_N)
        weight = self._map("out", num_rows, weight_NK)
        self._launch("out", num_rows, weight, bias, attended_TQ, x.residual_TD, num_rows)

    def gate_up(
        self, x: Stream, norm: Norm, weight_XK: Tensor, bias_N: Tensor | None, act_TF: Tensor
    ) -> None:
        num_rows, bias = len(act_TF), self._bias(bias_N)
        residual_TD, weight_D = x.residual_TD, norm.weight_D
        weight = self._map("gate_up", num_rows, weight_XK)
        self._launch("gate_up", num_rows, weight, bias, residual_TD, weight_D, act_TF, num_rows)

    def down(self, act_TF: Tensor, weight_NK: Tensor, bias_N: Tensor | None, x: Stream) -> None:
        num_rows, bias = len(act_TF), self._bias(bias_N)
        weight = self._map("down", num_rows, weight_NK)
        self._launch("down", num_rows, weight, bias, act_TF, x.residual_TD, num_rows)

    def head(
        self, x: Stream, rows_L: Tensor, norm: Norm, weight_NK: Tensor, logits_LV: Tensor
    ) -> None:
        arrays, num_rows = self._arrays, len(rows_L)
        self._variant = _variant(num_rows)
        self._launch(
            "head",
            num_rows,
            self._map("head", num_rows, weight_NK),
            x.residual_TD,
            norm.weight_D,
            rows_L,
            logits_LV,
            arrays["fused_best"],
            arrays["fused_epoch"],
            num_rows,
        )

    def sample_greedy(self, rows_L: Tensor, last_tokens_R: Tensor, out_tokens_L: Tensor) -> None:
        best, error = self._arrays["fused_best"], self._arrays["fused_error"]
        arguments = (best, rows_L, last_tokens_R, out_tokens_L, error, self._num_ctas)
        name, grid = f"pick_{self._variant}", (len(rows_L), 1, 1)
        self._library.launch(name, grid, arguments, True)

    def finish(self) -> None:
        """Nothing is held back."""

    def _launch(self, kernel: str, num_rows: int, *arguments: Tensor | TensorMap | int) -> None:
        name, grid = f"{kernel}_{_variant(num_rows)}", (self._num_ctas, 1, 1)
        self._library.launch(name, grid, arguments, True)

    def _map(self, kernel: str, num_rows: int, weight_NK: Tensor) -> TensorMap:
        variant = _variant(num_rows)
        key = f"{kernel}_{variant}", weight_NK.data_ptr()
        if key not in self._maps:
            dims, box = weight_box(self._shapes, kernel, len(weight_NK), tile_rows(variant))
            self._maps[key] = self._driver.tensor_map(weight_NK.data_ptr(), dims, box)
        return self._maps[key]

    def _cache_map(self, cache_NKPE: Tensor) -> TensorMap:
        key = "cache", cache_NKPE.data_ptr()
        if key not in self._maps:
            num_blocks, num_kv_heads, block_size, head_dim = cache_NKPE.shape
            self._maps[key] = self._driver.tensor_map(
                cache_NKPE.data_ptr(),
                (head_dim, block_size, num_blocks * num_kv_heads),
                CACHE_BOX,
                is_swizzled=True,
            )
        return self._maps[key]

    def _bias(self, bias_N: Tensor | None) -> Tensor:
        """The bias, or what stands for it where the kernel reads none."""
        return self._arrays["rope_cos_PE"] if bias_N is None else bias_N


def _variant(num_rows: int) -> int:
    return next(rows for rows in FUSED_ROWS if num_rows <= rows)
