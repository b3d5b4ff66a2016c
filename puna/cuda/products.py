"""Products: which kernel a product is, by the number of tokens, and where it leaves its result.

Beyond `Choices.direct_tokens` tokens cuBLAS computes the products: it writes `partial`, which has
the engine's dtype, and the consumer adds it. Up to so many, and always where the engine runs
deterministically, they are skinny ones, which add into the residual or leave parts for the consumer
to add; `partial` is not touched. Some targets have whole operations of their own for as many
tokens (`FusedOps`), and gate_up for many (`SwigluProduct`). Which it is depends on the stream's
number of tokens alone, so operations of one step may be recorded apart (but see
`CudaOps.attention`).

Shape suffixes as in `puna.cuda.ops`.
"""

from __future__ import annotations

from functools import partial

from puna.cuda.choices import Choices
from puna.cuda.interfaces import FusedOps, Kernels, SwigluProduct, Tensor
from puna.cuda.kernel_table import GEMM_TILES, ROW_BLOCK
from puna.cuda.launches import Launches
from puna.cuda_memory import PART_ROWS
from puna.ops import Linear, Stream


class Products:
    """The arguments are those of `CudaOps`; a target's own products are not used where the engine
    runs deterministically."""

    def __init__(
        self,
        kernels: Kernels,
        arrays: dict[str, Tensor],
        launches: Launches,
        choices: Choices,
        *,
        deterministic: bool,
        fused: tuple[tuple[int, FusedOps], ...],
        swiglu: SwigluProduct | None,
    ) -> None:
        self._kernels = kernels
        self._arrays = arrays
        self._launches = launches
        self._choices = choices
        self._is_deterministic = deterministic
        self._fused = () if deterministic else fused
        self._swiglu = None if deterministic else swiglu

    def fused(self, x: Stream) -> FusedOps | None:
        """The target's fused operations for a stream of so many rows."""
        num_tokens = len(x.residual_TD)
        return next((fused for most, fused in self._fused if num_tokens <= most), None)

    def beside(self, x: Stream) -> tuple[str, Tensor]:
        """What of a stream is beside its residual, by the number of its rows: nothing, the parts of
        a product, or `partial`."""
        fused = self.fused(x)
        if not self._is_direct(x) and fused is None:
            return "_partial", x.partial_TD
        if fused is None and self._leaves_parts("o", len(x.residual_TD)):
            return "_parts", self._arrays["product_parts"]
        return "", x.partial_TD

    def project(
        self, x: Stream, normed_TD: Tensor, weight_XK: Tensor, qkv_TX: Tensor
    ) -> tuple[str, Tensor]:
        """The product of q, k and v: which of the kernels reads it, and where it is."""
        if not self._is_direct(x):
            self._launches.product(normed_TD, weight_XK, qkv_TX)
        elif self._leaves_parts("qkv", len(normed_TD)):
            parts = self._arrays["product_parts"]
            self._skinny("qkv", normed_TD, weight_XK, None, qkv_TX, parts)
            return "_parts", parts
        else:
            self._skinny("qkv", normed_TD, weight_XK, None, qkv_TX)
        return "", qkv_TX

    def gate_up(
        self,
        x: Stream,
        normed_TD: Tensor,
        weight_XK: Tensor,
        bias_N: Tensor | None,
        gate_up_TX: Tensor,
        act_TF: Tensor,
    ) -> None:
        """act = silu(gate) * up, by way of `gate_up_TX` or not."""
        num_tokens, ffn = act_TF.shape
        from_swiglu = self._choices.swiglu_tokens
        if self._is_direct(x):
            self._skinny("gate_up", normed_TD, weight_XK, bias_N, act_TF)
            return
        if self._swiglu and from_swiglu is not None and num_tokens >= from_swiglu:
            call = partial(self._swiglu.gate_up, normed_TD, weight_XK, bias_N, act_TF)
            self._launches.own(call)
            return
        self._launches.product(normed_TD, weight_XK, gate_up_TX)
        grid = num_tokens, -(-ffn // ROW_BLOCK), 1
        arguments = gate_up_TX, self._bias(bias_N), act_TF
        self._launches.launch("silu_mul", grid, arguments)

    def into_stream(self, role: str, in_TK: Tensor, linear: Linear, x: Stream) -> None:
        """Add a product to the stream: to its residual, or beside it."""
        (matrix,) = linear.weights
        beside, array = self.beside(x)
        if beside != "_partial":
            parts = array if beside == "_parts" else None
            self._skinny(role, in_TK, matrix.data_NK, linear.bias_N, x.residual_TD, parts)
            return
        self._launches.product(in_TK, matrix.data_NK, x.partial_TD)
        if linear.bias_N is not None:
            num_tokens, hidden = x.partial_TD.shape
            grid = num_tokens, -(-hidden // ROW_BLOCK), 1
            self._launches.launch("add_bias", grid, (x.partial_TD, linear.bias_N))

    def logits(self, normed_LD: Tensor, weight_NK: Tensor, logits_LV: Tensor) -> None:
        self._skinny("head", normed_LD, weight_NK, None, logits_LV)

    def _is_direct(self, x: Stream) -> bool:
        """Whether products of this stream's rows are skinny ones."""
        return self._is_deterministic or len(x.residual_TD) <= self._choices.direct_tokens

    def _leaves_parts(self, role: str, num_tokens: int) -> bool:
        """Of a skinny product."""
        return num_tokens <= PART_ROWS and self._kernels.constant(f"gemm_{role}_16", "SPLITS") > 1

    def _skinny(
        self,
        role: str,
        x_MK: Tensor,
        w_NK: Tensor,
        bias_N: Tensor | None,
        y_MN: Tensor,
        parts: Tensor | None = None,
    ) -> None:
        """The skinny product of a role, in tiles of as many tokens as there are, or of the most:
        into y, or its parts for the consumer to add."""
        num_tokens = len(x_MK)
        tile = next((tile for tile in GEMM_TILES if num_tokens <= tile), GEMM_TILES[-1])
        name, num_splits = f"gemm_{role}_{tile}", 1
        splits = self._kernels.constant(name, "SPLITS")
        if parts is not None:
            num_splits = splits
        elif splits > 1:
            name, tile = f"gemm_{role}_whole", GEMM_TILES[-1]
        num_programs = -(-y_MN.shape[1] // self._kernels.constant(name, "BLOCK_N"))
        grid = -(-num_tokens // tile), num_programs, num_splits
        out = y_MN if parts is None else parts
        self._launches.launch(name, grid, (x_MK, w_NK, self._bias(bias_N), out, num_tokens))

    def _bias(self, bias_N: Tensor | None) -> Tensor:
        """The bias, or what stands for it where the kernel reads none."""
        return self._arrays["rope_cos_PE"] if bias_N is None else bias_N
