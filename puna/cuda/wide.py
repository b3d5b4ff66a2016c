"""WideDecode: the kernels of sm_90 for several tokens (csrc/wide_sm90.cu) as operations.

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
from puna.cuda.attend import Attend
from puna.cuda.driver import Driver, TensorMap
from puna.cuda.interfaces import Kernels
from puna.cuda.maps import WideMaps
from puna.cuda.wide_plan import variant
from puna.engine import EngineConfig
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
    """The operations over a session's workspace. `num_ctas`: multiprocessors of the GPU."""

    operations = frozenset(("qkv", "attention", "out", "gate_up", "down", "head"))

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
        self._held: _AddToStream | None = None

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
        is_finished = self._normalise(x, norm)
        self._launch(
            "qkv",
            len(q_TQ),
            self._maps.weight("qkv", weight_XK),
            self._next(len(q_TQ)),
            self._bias(bias_N),
            self._arrays["fused_sums"],
            is_finished,
            rope.cos_PE,
            rope.sin_PE,
            batch.positions_T,
            batch.slots_T,
            q_TQ,
            cache.keys_NKEP,
            cache.values_NKPE,
            len(q_TQ),
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
        attended_TQ = self._arrays["attended_TQ"][: len(q_TQ)]
        self._attend.attend(q_TQ, batch, cache, attended_TQ)
        self.out(attended_TQ, weight_NK, bias_N, x)

    def out(self, attended_TQ: Tensor, weight_NK: Tensor, bias_N: Tensor | None, x: Stream) -> None:
        self._held = _AddToStream("out", attended_TQ, weight_NK, bias_N, x.residual_TD)

    def gate_up(
        self, x: Stream, norm: Norm, weight_XK: Tensor, bias_N: Tensor | None, act_TF: Tensor
    ) -> None:
        is_finished = self._normalise(x, norm)
        self._launch(
            "gate_up",
            len(act_TF),
            self._maps.weight("gate_up", weight_XK),
            self._next(len(act_TF)),
            self._bias(bias_N),
            self._arrays["fused_sums"],
            is_finished,
            act_TF,
            len(act_TF),
        )

    def down(self, act_TF: Tensor, weight_NK: Tensor, bias_N: Tensor | None, x: Stream) -> None:
        self.finish()
        self._held = _AddToStream("down", act_TF, weight_NK, bias_N, x.residual_TD)

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
        self._add_to_stream(_NONE)

    def _normalise(self, x: Stream, norm: Norm) -> int:
        """Launch what writes `fused_next`; 1 if that has the norm's factor, 0 if the sums of
        squares are in `fused_sums`."""
        held, residual_TD = self._held, x.residual_TD
        if held and held.residual_TD is residual_TD:
            self._add_to_stream(norm.weight_D)
            return 0
        self.finish()
        self._enter(x, norm, _NONE, len(x.residual_TD))
        return 1

    def _enter(self, x: Stream, norm: Norm, rows_L: Tensor | int, num_rows: int) -> None:
        arguments = (x.residual_TD, norm.weight_D, rows_L, self._arrays["fused_next"])
        self._kernels.launch(f"enter_{variant(num_rows)}", (num_rows, 1, 1), arguments, True)

    def _add_to_stream(self, gamma_D: Tensor | int) -> None:
        held, self._held = self._held, None
        if held is None:
            return
        self._launch(
            held.kernel,
            len(held.input_TK),
            self._maps.weight(held.kernel, held.weight_NK),
            self._maps.input(held.input_TK),
            self._bias(held.bias_N),
            held.residual_TD,
            gamma_D,
            self._arrays["fused_next"],
            self._arrays["fused_sums"],
            len(held.input_TK),
        )

    def _launch(self, kernel: str, num_tokens: int, *arguments: Tensor | TensorMap | int) -> None:
        grid = self._num_ctas, 1, 1
        self._kernels.launch(f"{kernel}_{variant(num_tokens)}", grid, arguments, True)

    def _next(self, num_tokens: int) -> TensorMap:
        return self._maps.input(self._arrays["fused_next"][:num_tokens])

    def _bias(self, bias_N: Tensor | None) -> Tensor:
        """The bias, or what stands for it where the kernel reads none."""
        return self._arrays["rope_cos_PE"] if bias_N is None else bias_N
