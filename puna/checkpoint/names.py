"""NameMap: from a format's tensor names to puna's. The names themselves stand with each reader."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class NameMap:
    """`top` maps whole names; `layer` maps what stands between `prefix`, a number and the suffix.

    >>> names = NameMap({"tok.weight": "embed.weight"}, "blk", {"ffn_gate": "mlp.gate"})
    >>> names.canonical("blk.3.ffn_gate.weight"), names.canonical("blk.03.ffn_gate.weight")
    ('layers.3.mlp.gate.weight', None)
    """

    top: Mapping[str, str]
    prefix: str
    layer: Mapping[str, str]

    def canonical(self, name: str) -> str | None:
        """puna's name of a tensor, or None. Norms have no bias in the Llama family."""
        if name in self.top:
            return self.top[name]
        pattern = re.escape(self.prefix) + r"\.(0|[1-9]\d{0,5})\.(.+)\.(weight|bias)"
        match = re.fullmatch(pattern, name)
        if match is None or match[2] not in self.layer:
            return None
        if match[3] == "bias" and "norm" in match[2]:
            return None
        return f"layers.{match[1]}.{self.layer[match[2]]}.{match[3]}"
