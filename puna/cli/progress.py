"""Progress bars on stderr, where it is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from puna.builder import Progress


@contextmanager
def byte_bar(what: str) -> Iterator[Progress]:
    """Yield a function (done, total) in bytes that draws a bar; quiet when stderr is no
    terminal."""
    from tqdm import tqdm

    with tqdm(
        desc=what,
        unit="B",
        unit_scale=True,
        file=sys.stderr,
        disable=None,
        leave=False,
        mininterval=0.2,
    ) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update
