"""puna builds engines for LLaMA-family models and runs them.

from puna import LLM, SamplingParams, build

build("path/to/checkpoint", "engine/")
with LLM("engine/") as llm:
    print(llm.generate(["Hello"], SamplingParams(max_new_tokens=32))[0].text)
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from puna.errors import PunaError

if TYPE_CHECKING:
    from puna.builder import build
    from puna.llm import LLM
    from puna.plan import BuildConfig
    from puna.runtime.request import SamplingParams

__all__ = ["LLM", "BuildConfig", "PunaError", "SamplingParams", "build"]

_HOMES = MappingProxyType(
    {
        "LLM": "puna.llm",
        "BuildConfig": "puna.plan",
        "SamplingParams": "puna.runtime.request",
        "build": "puna.builder",
    }
)


def __getattr__(name: str) -> Any:
    """Import each public name when it is first used, so that `import puna` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'puna' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
