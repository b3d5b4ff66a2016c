"""WideDecode: the wide kernels of sm_90 (csrc/wide_sm90.cu) as operations, for 17 to 64 tokens.

Decides which of the compiled variants runs and with what, and who normalises: `out` and `down`
write the input of the product behind the next norm beside the residual, so they are held back
until it is known. Where something else wrote the residual, or the next product is the head, which
picks rows, `enter` does it.

Shape suffixes as in `puna.cuda.ops`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from puna.batch import ForwardBatch
from puna.cuda.driver import Driver, TensorMap
from puna.cuda.fused_plan import CLUSTER, FusedShapes
from puna.cuda.library import Library
from puna.cuda.maps import TensorMaps
from puna.cuda.wide_plan import MAX_CTAS, WIDE_ROWS, input_box, wide_box
from puna.ops import LayerCache, Norm, RopeTable, Stream

Tensor = Any

_NONE = 0  # an address


@dataclass(frozen=True, slots=True)
class _AddToStream:
    """A product that adds to the residual, held back."""

    kernel: str
    input_TK: Tensor
    weight_NK: Tensor
    bias_N: Tensor | None
    residual_TD: Tensor


class WideDecode:
    """The wide operations over a session's workspace. `num_ctas`: multiprocessors of the GPU."""

    operations = frozenset(("qkv", "attention", "gate_up", "down", "head"))

    def __init__(
        self,
        shapes: FusedShapes,
        library: Library,
        driver: Driver,
        arrays: dict[str, Tensor],
        num_ctas: int,
    ) -> None:
        self._shapes = shapes
        self._library = library
        self._driver = driver
        self._arrays = arrays
        self._num_ctas = num_ctas
        self._grid = min(num_ctas, MAX_CTAS) // CLUSTER * CLUSTER  # of a product
        self._held: _AddToStream | None = None
        self._variant = 8  # of the head recorded last
        self._cache_maps = TensorMaps(shapes, driver)
        self._maps: dict[tuple[Any, ...], TensorMap] = {}  # by address and what they describe

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
        num_rows, arrays = len(x.residual_TD), self._arrays
        is_finished = self._normalise(x, norm)
        self._launch_product(
            "qkv",
            weight_XK,
            arrays["fused_next"][:num_rows],
            self._bias(bias_N),
            arrays["fused_sums"],
            rope.cos_PE,
            rope.sin_PE,
            batch.positions_T,
            batch.slots_T,
            cache.keys_NKEP,
            cache.values_NKPE,
            arrays["fused_fresh"],
            is_finished,
        )

    def attention(
        self,
        q_TQ: Tensor,
        batch: ForwardBatch,
        cache: LayerCache,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        x: Stream,
    ) -> None:
        arrays, num_rows = self._arrays, len(x.residual_TD)
        attended_TQ = arrays["attended_TQ"][:num_rows]
        arguments = (
            batch.seq_lens_S,
            batch.block_table_SM,
            self._cache_maps.cache(cache.keys_NKEP),
            self._cache_maps.cache(cache.values_NKPE),
            attended_TQ,
            arrays["fused_part"],
            arrays["fused_fresh"],
            arrays["fused_split_count"],
            arrays["fused_error"],
            batch.block_table_SM.shape[1],
            num_rows,
        )
        self._launch("attention", _variant(num_rows), self._num_ctas, arguments)
        self._held = _AddToStream("out", attended_TQ, weight_NK, bias_N, x.residual_TD)

    def gate_up(
        self, x: Stream, norm: Norm, weight_XK: Tensor, bias_N: Tensor | None, act_TF: Tensor
    ) -> None:
        is_finished = self._normalise(x, norm)
        arrays, bias = self._arrays, self._bias(bias_N)
        next_TD, sums = arrays["fused_next"][: len(act_TF)], arrays["fused_sums"]
        self._launch_product("gate_up", weight_XK, next_TD, bias, sums, act_TF, is_finished)

    def down(self, act_TF: Tensor, weight_NK: Tensor, bias_N: Tensor | None, x: Stream) -> None:
        self.finish()
        self._held = _AddToStream("down", act_TF, weight_NK, bias_N, x.residual_TD)

    def head(
        self, x: Stream, rows_L: Tensor, norm: Norm, weight_NK: Tensor, logits_LV: Tensor
    ) -> None:
        self.finish()
        num_rows, arrays = len(rows_L), self._arrays
        self._variant = _variant(num_rows)
        self._enter(x, norm, rows_L, num_rows)
        next_TD, best = arrays["fused_next"][:num_rows], arrays["fused_best"]
        self._launch_product("head", weight_NK, next_TD, logits_LV, best)

    def sample_greedy(self, rows_L: Tensor, last_tokens_R: Tensor, out_tokens_L: Tensor) -> None:
        best, error = self._arrays["fused_best"], self._arrays["fused_error"]
        arguments = (best, rows_L, last_tokens_R, out_tokens_L, error, self._grid)
        self._launch("pick", self._variant, len(rows_L), arguments)

    def finish(self) -> None:
        self._add_to_stream(_NONE)

    def _normalise(self, x: Stream, norm: Norm) -> int:
        """Launch what writes `fused_next`; 1 if that has the norm's factor, 0 if the sums of squares
        are in `fused_sums`."""
        held = self._held
        if held and held.residual_TD.data_ptr() == x.residual_TD.data_ptr():
            self._add_to_stream(norm.weight_D)
            return 0
        self.finish()
        self._enter(x, norm, _NONE, len(x.residual_TD))
        return 1

    def _enter(self, x: Stream, norm: Norm, rows_L: Tensor | int, num_rows: int) -> None:
        arguments = (x.residual_TD, norm.weight_D, rows_L, self._arrays["fused_next"])
        self._launch("enter", _variant(num_rows), num_rows, arguments)

    def _add_to_stream(self, gamma_D: Tensor | int) -> None:
        held, self._held = self._held, None
        if held is None:
            return
        self._launch_product(
            held.kernel,
            held.weight_NK,
            held.input_TK,
            self._bias(held.bias_N),
            held.residual_TD,
            gamma_D,
            self._arrays["fused_next"],
            self._arrays["fused_sums"],
        )

    def _launch_product(
        self, kernel: str, weight_NK: Tensor, input_TK: Tensor, *arguments: Tensor | int
    ) -> None:
        num_rows = len(input_TK)
        variant = _variant(num_rows)
        maps = self._weight_map(kernel, weight_NK), self._input_map(input_TK, variant)
        self._launch(kernel, variant, self._grid, (*maps, *arguments, num_rows))

    def _launch(
        self, kernel: str, variant: int, grid: int, arguments: tuple[Tensor | TensorMap | int, ...]
    ) -> None:
        self._library.launch(f"wide_{kernel}_{variant}", (grid, 1, 1), arguments, True)

    def _weight_map(self, kernel: str, weight_NK: Tensor) -> TensorMap:
        return self._map(weight_NK, *wide_box(self._shapes, kernel, len(weight_NK)))

    def _input_map(self, input_TK: Tensor, variant: int) -> TensorMap:
        num_tokens, num_cols = input_TK.shape
        return self._map(input_TK, *input_box(num_tokens, num_cols, variant))

    def _map(
        self, array: Tensor, dims: tuple[int, int, int], box: tuple[int, int, int]
    ) -> TensorMap:
        address = array.data_ptr()
        key = address, dims, box
        if key not in self._maps:
            self._maps[key] = self._driver.tensor_map(address, dims, box, is_swizzled=True)
        return self._maps[key]

    def _bias(self, bias_N: Tensor | None) -> Tensor:
        """The bias, or what stands for it where the kernel reads none."""
        return self._arrays["rope_cos_PE"] if bias_N is None else bias_N


def _variant(num_rows: int) -> int:
    return next(rows for rows in WIDE_ROWS if num_rows <= rows)
