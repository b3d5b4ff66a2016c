"""flags: what the three scripts of this folder have in common.

A flag of the guide does something here, or is accepted with a note of what puna does instead, or
is refused with what to use. This file knows the form of that, not the meaning of any flag.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from puna.errors import ConfigError
from puna.runtime.launch import speaks_for_all

DTYPES = ("float32", "bfloat16", "float16")
LOG_LEVELS = ("verbose", "info", "warning", "error", "internal_error")


class Parser(argparse.ArgumentParser):
    """Leaves out what was not given; an error in a flag is one line, of rank 0."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description,
            argument_default=argparse.SUPPRESS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def add_log_level(self, default: str) -> None:
        self.add_argument(
            "--log_level",
            choices=LOG_LEVELS,
            help="up to info: progress bars, and what was done; from warning on: notes only "
            f"(default: {default})",
        )

    def add_master(self) -> None:
        self.add_argument(
            "--master_addr",
            metavar="HOST",
            help="of rank 0, where the launcher does not tell; see docs/deploy.md",
        )
        self.add_argument("--master_port", type=int, metavar="N", help="the same")

    def error(self, message: str) -> NoReturn:
        line = f"{self.prog}: {message} (see {self.prog} --help)\n"
        self.exit(2, line if speaks_for_all() else None)


class Flags:
    """One command line: what was given, and defaults for the rest."""

    def __init__(
        self, parser: Parser, defaults: Mapping[str, Any], argv: Sequence[str] | None = None
    ) -> None:
        self._given = vars(parser.parse_args(argv))
        self._defaults = defaults

    def __getitem__(self, name: str) -> Any:
        """The value that was given, else the default, else None."""
        return self._given.get(name, self._defaults.get(name))

    def __contains__(self, name: str) -> bool:
        """Whether the flag was given."""
        return name in self._given

    def notes(self, texts: Mapping[str, str]) -> list[str]:
        """A note for each of `texts` whose flag was given; flags of the same text share it."""
        names: dict[str, list[str]] = {}
        for name, text in texts.items():
            if name in self:
                names.setdefault(text, []).append(name)
        return [f"{', '.join(found)}: {text}" for text, found in names.items()]

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """ConfigError for the first of `reasons` whose flag was given."""
        for name, reason in reasons.items():
            if name in self:
                raise ConfigError(f"--{name} asks for what puna does not have: {reason}")

    def exclude(self, *names: str) -> None:
        """ConfigError if more than one of `names` was given."""
        found = [f"--{name}" for name in names if name in self]
        if len(found) > 1:
            raise ConfigError(f"{' and '.join(found)} exclude each other: give one of them")

    @property
    def is_talkative(self) -> bool:
        return self["log_level"] in ("verbose", "info")


def print_notes(notes: Iterable[str]) -> None:
    """All notes in one line on stderr, by rank 0."""
    if (line := "; ".join(notes)) and speaks_for_all():
        print(f"note: {line}", file=sys.stderr)
