"""WideDecode: the kernels of sm_90 for several tokens (csrc/wide_sm90.cu) as operations.

Decides which of the compiled variants runs and with what. Products that follow each other, up to
the next layer's attention, are one launch, so they are held back until all of it is known. Who
writes the residual writes the input of the product behind the next norm beside it. Where something
else wrote the residual, or the next product is the head, which picks rows, `enter` does that.

Shape suffixes as in `puna.cuda.ops`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from puna.batch import ForwardBatch
from puna.cuda.attend import Attend
from puna.cuda.driver import Driver, TensorMap
from puna.cuda.interfaces import Kernels
from puna.cuda.maps import WideMaps
from puna.cuda.source_table import several_tokens
from puna.cuda.wide_plan import PRODUCTS, TOKENS, variant
from puna.engine import EngineConfig
from puna.ops import LayerCache, Norm, RopeTable, Stream

Tensor = Any

_NONE = 0  # an address
BREAKS = ()


@dataclass(slots=True)
class _Layer:
    """Products that are held back, as the kernel's arguments: those of absent ones are absent.
    `residual_TD`: that they read or add to."""

    residual_TD: Tensor
    num_tokens: int
    is_finished: bool  # the norm's factor is in the input of the first of them
    products: list[str]
    arguments: dict[str, Tensor | TensorMap | int]


class WideDecode:
    """The operations over a session's workspace. `num_ctas`: multiprocessors of the GPU."""

    operations = frozenset(("qkv", "attention", "out", "gate_up", "down", "head"))
    most_logits = TOKENS[-1]

    def __init__(
        self,
        config: EngineConfig,
        kernels: Kernels,
        driver: Driver,
        arrays: dict[str, Tensor],
        num_ctas: int,
        attend: Attend,
    ) -> None:
        self._attend = attend
        self._kernels = kernels
        self._arrays = arrays
        self._num_ctas = num_ctas // 2 * 2  # clusters of two
        self._maps = WideMaps(config, driver)
        self._held: _Layer | None = None
        self._arguments = several_tokens(config.dtype)["layer"]

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
        held = self._behind_norm("qkv", x, norm, weight_XK, bias_N)
        held.arguments |= {
            "cos": rope.cos_PE,
            "sin": rope.sin_PE,
            "positions": batch.positions_T,
            "slots": batch.slots_T,
            "q": q_TQ,
            "keys": cache.keys_NKEP,
            "values": cache.values_NKPE,
        }
        self.finish()

    def attention(
        self,
        q_TQ: Tensor,
        batch: ForwardBatch,
        cache: LayerCache,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        x: Stream,
    ) -> None:
        attended_TQ = self._arrays["attended_TQ"][: len(q_TQ)]
        self._attend.attend(q_TQ, batch, cache, attended_TQ)
        self.out(attended_TQ, weight_NK, bias_N, x)

    def out(self, attended_TQ: Tensor, weight_NK: Tensor, bias_N: Tensor | None, x: Stream) -> None:
        self.finish()
        held = self._hold("out", x, weight_NK, bias_N)
        held.arguments["attended"] = self._maps.input(attended_TQ)

    def gate_up(
        self, x: Stream, norm: Norm, weight_XK: Tensor, bias_N: Tensor | None, act_TF: Tensor
    ) -> None:
        held = self._behind_norm("gate_up", x, norm, weight_XK, bias_N)
        held.arguments["y"] = act_TF

    def down(self, act_TF: Tensor, weight_NK: Tensor, bias_N: Tensor | None, x: Stream) -> None:
        if self._held and ("down" in BREAKS or not self._ends_with("gate_up", x)):
            self.finish()
        held = self._hold("down", x, weight_NK, bias_N)
        held.arguments["act"] = self._maps.input(act_TF)

    def head(
        self, x: Stream, rows_L: Tensor, norm: Norm, weight_NK: Tensor, logits_LV: Tensor
    ) -> None:
        self.finish()
        arrays, num_rows = self._arrays, len(rows_L)
        self._enter(x, norm, rows_L, num_rows)
        self._launch(
            "head",
            num_rows,
            self._maps.weight("head", weight_NK),
            self._next(num_rows),
            logits_LV,
            arrays["fused_best"],
            arrays["fused_epoch"],
            num_rows,
        )

    def sample_greedy(self, rows_L: Tensor, last_tokens_R: Tensor, out_tokens_L: Tensor) -> None:
        best, error = self._arrays["fused_best"], self._arrays["fused_error"]
        arguments = (best, rows_L, last_tokens_R, out_tokens_L, error, self._num_ctas)
        self._kernels.launch(f"pick_{variant(len(rows_L))}", (len(rows_L), 1, 1), arguments, True)

    def finish(self) -> None:
        held, self._held = self._held, None
        if held is None:
            return
        held.arguments |= {
            "h": held.residual_TD,
            "next": self._arrays["fused_next"],
            "next_input": self._next(held.num_tokens),
            "sums": self._arrays["fused_sums"],
            "meetings": self._arrays["fused_meetings"],
            "error": self._arrays["fused_error"],
            "parts": sum(1 << PRODUCTS.index(product) for product in held.products),
            "is_finished": int(held.is_finished),
            "num_tokens": held.num_tokens,
        }
        absent = {name: self._next(1) if kind == "map" else _NONE for name, kind in self._arguments}
        self._launch("layer", held.num_tokens, *(absent | held.arguments).values())

    def _behind_norm(
        self, product: str, x: Stream, norm: Norm, weight_XK: Tensor, bias_N: Tensor | None
    ) -> _Layer:
        """Hold a product back whose input is the norm of the residual."""
        before = "down" if product == "qkv" else "out"
        if self._ends_with(before, x):
            self._held.arguments[f"{before}_gamma"] = norm.weight_D
            if product in BREAKS:
                self.finish()
            held = self._hold(product, x, weight_XK, bias_N)
        else:
            self.finish()
            self._enter(x, norm, _NONE, len(x.residual_TD))
            held = self._hold(product, x, weight_XK, bias_N)
            held.is_finished = True
        return held

    def _ends_with(self, product: str, x: Stream) -> bool:
        """What is held back, of this stream."""
        held = self._held
        return bool(held and held.residual_TD is x.residual_TD and held.products[-1] == product)

    def _hold(self, product: str, x: Stream, weight_XK: Tensor, bias_N: Tensor | None) -> _Layer:
        """Behind what is held back, where there is something."""
        residual_TD = x.residual_TD
        if self._held is None:
            self._held = _Layer(residual_TD, len(residual_TD), False, [], {})
        self._held.products.append(product)
        self._held.arguments[f"{product}_weights"] = self._maps.weight(product, weight_XK)
        self._held.arguments[f"{product}_bias"] = _NONE if bias_N is None else bias_N
        return self._held

    def _enter(self, x: Stream, norm: Norm, rows_L: Tensor | int, num_rows: int) -> None:
        arguments = (x.residual_TD, norm.weight_D, rows_L, self._arrays["fused_next"])
        self._kernels.launch(f"enter_{variant(num_rows)}", (num_rows, 1, 1), arguments, True)

    def _launch(self, kernel: str, num_tokens: int, *arguments: Tensor | TensorMap | int) -> None:
        grid = self._num_ctas, 1, 1
        self._kernels.launch(f"{kernel}_{variant(num_tokens)}", grid, arguments, True)

    def _next(self, num_tokens: int) -> TensorMap:
        return self._maps.input(self._arrays["fused_next"][:num_tokens])
