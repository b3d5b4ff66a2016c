"""A GGUF model in llama.cpp, for the benchmarks that compare with it.

Imported by path, in an interpreter that has llama-cpp-python and need not have puna.
"""

from __future__ import annotations

import random
import time
from pathlib import Path


class Peer:
    """An open model. `context` tokens at most, `batch` of them in a physical batch."""

    def __init__(self, gguf: Path, threads: int, *, context: int = 1024, batch: int = 512) -> None:
        import ctypes

        import llama_cpp as lc

        @lc.llama_log_callback
        def quiet(level: int, text: bytes, data: ctypes.c_void_p) -> None:
            """Nothing on stderr."""

        lc.llama_log_set(quiet, ctypes.c_void_p(0))
        lc.llama_backend_init()
        model_params = lc.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model = lc.llama_model_load_from_file(str(gguf).encode(), model_params)
        params = lc.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, context, batch
        params.n_threads = params.n_threads_batch = threads
        self.lc = lc
        self._quiet = quiet  # lives as long as it may be called
        self.context = lc.llama_init_from_model(model, params)
        self.vocab_size = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(model))
        self.version = lc.__version__
        self._rng = random.Random(0)

    def clear(self) -> None:
        """Forget what the KV cache holds."""
        self.lc.llama_memory_clear(self.lc.llama_get_memory(self.context), True)

    def run(self, isl: int, num_new: int) -> tuple[float, list[float]]:
        """Seconds of a prompt of `isl` random tokens, and of each of `num_new` steps after it."""
        self.clear()
        return self._seconds(isl), [self._seconds(1) for _ in range(num_new)]

    def _seconds(self, num_tokens: int) -> float:
        tokens = (self._rng.randrange(self.vocab_size) for _ in range(num_tokens))
        ids = (self.lc.llama_token * num_tokens)(*tokens)
        start = time.perf_counter()
        status = self.lc.llama_decode(self.context, self.lc.llama_batch_get_one(ids, num_tokens))
        self.lc.llama_get_logits_ith(self.context, -1)
        assert status == 0, status
        return time.perf_counter() - start
