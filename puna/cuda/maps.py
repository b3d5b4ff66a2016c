"""Tensor maps of weights and KV caches for the fused kernels of sm_90, made once each."""

from __future__ import annotations

from typing import Any

from puna.cuda.driver import Driver, TensorMap
from puna.cuda.fused_plan import CACHE_BOX, FusedShapes, weight_box

Tensor = Any


class TensorMaps:
    """By kernel, address and size: an address may come to hold another array."""

    def __init__(self, shapes: FusedShapes, driver: Driver) -> None:
        self._shapes = shapes
        self._driver = driver
        self._maps: dict[tuple[Any, ...], TensorMap] = {}

    def weight(self, kernel: str, weight_NK: Tensor) -> TensorMap:
        key = kernel, weight_NK.data_ptr(), len(weight_NK)
        if key not in self._maps:
            dims, box = weight_box(self._shapes, kernel, len(weight_NK))
            self._maps[key] = self._driver.tensor_map(weight_NK.data_ptr(), dims, box)
        return self._maps[key]

    def cache(self, cache_NKPE: Tensor) -> TensorMap:
        num_blocks, num_kv_heads, block_size, head_dim = cache_NKPE.shape
        dims = head_dim, block_size, num_blocks * num_kv_heads
        key = "cache", cache_NKPE.data_ptr(), dims
        if key not in self._maps:
            self._maps[key] = self._driver.tensor_map(
                cache_NKPE.data_ptr(), dims, CACHE_BOX, is_swizzled=True
            )
        return self._maps[key]
