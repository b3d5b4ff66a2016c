"""Tensor maps for the kernels of sm_90, made once each."""

from __future__ import annotations

from typing import Any

from puna.cuda.attend_plan import STRETCH
from puna.cuda.driver import Driver, TensorMap
from puna.cuda.fused_plan import weight_box
from puna.cuda.shapes import FusedShapes, fused_shapes
from puna.cuda.wide_plan import COLUMNS, cut
from puna.engine import EngineConfig

Tensor = Any
Box = tuple[int, ...]


class TensorMaps:
    """By address and what they describe: an address may come to hold another array."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._maps: dict[tuple[Any, ...], TensorMap] = {}

    def get(
        self,
        array: Tensor,
        dims: Box,
        box: Box,
        *,
        strides: Box | None = None,
        is_swizzled: bool = False,
    ) -> TensorMap:
        """`Driver.tensor_map` of an array."""
        address = array.data_ptr()
        key = address, dims, box, strides, is_swizzled
        if key not in self._maps:
            self._maps[key] = self._driver.tensor_map(
                address, dims, box, strides=strides, is_swizzled=is_swizzled
            )
        return self._maps[key]


class CacheMaps(TensorMaps):
    """Of KV caches, as attention copies them."""

    def cache(self, cache_NKPE: Tensor, num_tokens: int = STRETCH) -> TensorMap:
        """In boxes of so many tokens of a head, each eight of them by itself: 64 dimensions, the
        other 64."""
        num_blocks, num_kv_heads, block_size, head_dim = cache_NKPE.shape
        parts = head_dim // 64
        dims = 64, 8, parts, block_size // 8, num_blocks * num_kv_heads
        strides = head_dim, 64, 8 * head_dim, block_size * head_dim
        box = 64, 8, parts, num_tokens // 8, 1
        return self.get(cache_NKPE, dims, box, strides=strides, is_swizzled=True)


class FusedMaps(CacheMaps):
    """Of weights and KV caches, as the fused kernels copy them."""

    def __init__(self, shapes: FusedShapes, driver: Driver) -> None:
        super().__init__(driver)
        self._shapes = shapes

    def weight(self, kernel: str, weight_NK: Tensor) -> TensorMap:
        return self.get(weight_NK, *weight_box(self._shapes, kernel, len(weight_NK)))


class WideMaps(TensorMaps):
    """Of weights and inputs, as the products of several tokens copy them."""

    def __init__(self, config: EngineConfig, driver: Driver) -> None:
        super().__init__(driver)
        self._config, self._shapes = config, fused_shapes(config)

    def weight(self, kernel: str, weight_NK: Tensor) -> TensorMap:
        """Of a matrix, in boxes of a unit of the kernel that multiplies it."""
        shapes, (num_rows, num_cols) = self._shapes, weight_NK.shape
        unit = cut(shapes, self._config.spec.vocab_size, kernel).unit
        if kernel == "qkv":
            # Eight rows of one half of a head, eight of the other, the next eight ...
            half = shapes.head_dim // 2
            dims = num_cols, 8, 2, half // 8, num_rows // shapes.head_dim
            strides = tuple(num_cols * rows for rows in (1, half, 8, shapes.head_dim))
            box = COLUMNS, 8, 2, unit // 8, 1
            return self.get(weight_NK, dims, box, strides=strides, is_swizzled=True)
        rows = shapes.ffn if kernel == "gate_up" else num_rows
        dims = num_cols, rows, num_rows // rows
        return self.get(weight_NK, dims, (COLUMNS, unit, 1), is_swizzled=True)

    def input(self, x_TK: Tensor) -> TensorMap:
        """Rows beyond those of the array are zeros."""
        num_tokens, num_cols = x_TK.shape
        box = COLUMNS, -(-num_tokens // 8) * 8, 1
        return self.get(x_TK, (num_cols, num_tokens, 1), box, is_swizzled=True)
