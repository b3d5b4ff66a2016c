"""ChatEnvironment: Jinja's immutable sandbox, set up as published chat templates expect it.

Imported only when a template is rendered, so that nothing else pays for Jinja.
"""

from __future__ import annotations

from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_REPEAT = 2**20
MAX_NUMBER = 2**1000


class GenerationTag(Extension):
    """`{% generation %}` marks the model's own text for training; a prompt just shows its body."""

    tags = {"generation"}  # noqa: RUF012 (the attribute Jinja reads)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers' templates; repetition and powers are bounded as `range` is."""

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
        )

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, (int, float)) and isinstance(right, (int, float)):
            if operator == "**" and (abs(left) > MAX_REPEAT or abs(right) > 64):
                raise OverflowError("a power is too large")
            if max(abs(left), abs(right)) > MAX_NUMBER:
                raise OverflowError("a product is too large")
        else:  # a sequence times a number
            size = 1
            for side in (left, right):
                size *= abs(side) if isinstance(side, (int, float)) else len(side)
            if size > MAX_REPEAT:
                raise OverflowError(f"a repetition makes more than {MAX_REPEAT} items")
        return super().call_binop(context, operator, left, right)
