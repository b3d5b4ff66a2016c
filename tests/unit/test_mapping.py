"""Which rank holds what, and which splits are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.errors import ConfigError
from puna.mapping import Mapping, check_parallel
from puna.spec import ModelSpec

SPEC = ModelSpec(64, 172, 5, 8, 4, 8, 512, 512)


@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 40))
def test_ranks_fill_the_grid_and_stages_share_the_layers(tp: int, pp: int, extra: int) -> None:
    num_layers = pp + extra - 1
    ranks = [Mapping(rank, tp, pp) for rank in range(tp * pp)]
    assert len({(m.tp_rank, m.pp_rank) for m in ranks}) == tp * pp
    assert [m.pp_rank for m in ranks] == sorted(m.pp_rank for m in ranks), "neighbours share tp"
    stages = [Mapping(stage * tp, tp, pp).layers(num_layers) for stage in range(pp)]
    assert [i for stage in stages for i in stage] == list(range(num_layers))
    sizes = {len(stage) for stage in stages}
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    assert sum(m.is_first_stage for m in ranks) == sum(m.is_last_stage for m in ranks) == tp


def test_a_rank_outside_the_grid_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        Mapping(4, 2, 2)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 5), (8, 2)])
def test_legal_splits(tp: int, pp: int) -> None:
    check_parallel(SPEC, tp, pp)


@pytest.mark.parametrize(
    ("tp", "pp", "message"),
    [
        (0, 1, "at least 1"),
        (1, 0, "at least 1"),
        (3, 1, "use tp 1, 2, 4, 8"),
        (16, 1, "use tp 1, 2, 4, 8"),
        (1, 6, "use pp 5 or fewer"),
    ],
)
def test_illegal_splits_name_the_legal_ones(tp: int, pp: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_parallel(SPEC, tp, pp)


def test_every_split_that_the_message_names_is_legal() -> None:
    nine = ModelSpec(576, 1536, 30, 9, 3, 64, 49152, 8192)
    with pytest.raises(ConfigError, match=r"use tp 1, 3, 9$"):
        check_parallel(nine, 2, 1)
    for tp in (1, 3, 9):
        check_parallel(nine, tp, 1)
