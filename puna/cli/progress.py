"""Progress bars on stderr, where it is a terminal and nobody asked for quiet; of several ranks,
rank 0's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from puna.runtime.launch import speaks_for_all

if TYPE_CHECKING:
    from puna.builder import Progress


@contextmanager
def byte_bar(what: str, is_quiet: bool = False) -> Iterator[Progress]:
    """Yield a function (done, total) in bytes that draws a bar; quiet when stderr is no
    terminal."""
    with _bar(what, "B", is_scaled=True, is_quiet=is_quiet) as update:
        yield update


@contextmanager
def kernel_bar(what: str, is_quiet: bool = False) -> Iterator[Progress]:
    """The same in kernels."""
    with _bar(what, "kernel", is_scaled=False, is_quiet=is_quiet) as update:
        yield update


@contextmanager
def token_bar(what: str, is_quiet: bool = False) -> Iterator[Progress]:
    """The same in tokens."""
    with _bar(what, "tok", is_scaled=False, is_quiet=is_quiet) as update:
        yield update


@contextmanager
def prompt_bar(what: str, is_quiet: bool = False) -> Iterator[Progress]:
    """The same in prompts."""
    with _bar(what, "prompt", is_scaled=False, is_quiet=is_quiet) as update:
        yield update


@contextmanager
def _bar(what: str, unit: str, is_scaled: bool, is_quiet: bool) -> Iterator[Progress]:
    """A bar that appears with the first news and goes when all is done."""
    with ExitStack() as stack:
        bar: Any = None

        def update(done: int, total: int) -> None:
            nonlocal bar
            from tqdm import tqdm

            if bar is None:
                bar = tqdm(
                    desc=what,
                    unit=unit,
                    unit_scale=is_scaled,
                    file=sys.stderr,
                    disable=None if speaks_for_all() and not is_quiet else True,
                    leave=False,
                    mininterval=0.2,
                )
                stack.callback(bar.close)
            bar.total = total
            bar.update(done - bar.n)
            if done >= total:
                bar.close()

        yield update
