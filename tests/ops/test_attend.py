"""Decode attention of sm_90 as a kernel of its own, emulated on the CPU, against torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import emulator
import pytest
import torch
from cuda_configs import BLOCK, cuda_config
from emulator import EmulatedDriver, EmulatedLibrary

from puna.batch import ForwardBatch
from puna.cuda.attend import Attend
from puna.cuda.source_table import cuda_sources
from puna.cuda_memory import cuda_specs
from puna.ops import LayerCache
from puna.spec import ModelSpec

pytestmark = pytest.mark.skipif(emulator.COMPILER is None, reason="needs g++")
Tensor = Any
Dtype = Literal["float16", "bfloat16"]
# Query heads, KV heads, head_dim.
SIZES: dict[str, tuple[int, int, int, Dtype]] = {
    "grouped": (32, 8, 64, "bfloat16"),
    "alone": (3, 3, 128, "float16"),
    "one of eight": (8, 1, 128, "bfloat16"),
}


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return {}


def library_for(name: str, made: dict[str, Any], folder: Path) -> Any:
    if name not in made:
        heads, kv_heads, size, dtype = SIZES[name]
        spec = ModelSpec(heads * size, 1024, 2, heads, kv_heads, size, 1000, 512)
        config = cuda_config(spec, dtype, max_batch_size=64, max_seq_len=4096)
        sources = [it for it in cuda_sources(config) if it.name == "attend"]
        made[name] = config, EmulatedLibrary(sources, folder)
    return made[name]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    ("contexts", "num_ctas"),
    [
        ([1], 3),
        ([0, 0], 2),
        ([2000], 7),
        ([5, 33], 4),
        ([40, 0, 7], 4),
        ([96, 96], 5),
        ([97, 97, 97, 96, 96, 95], 4),  # tasks that are not quite even, whole
        ([97, 0, 97, 96], 4),
        ([200, 200, 200, 200], 2),
        ([64, 1, 300, 129, 31, 32, 40, 256], 5),
        ([1 + 61 * i % 300 for i in range(40)], 4),
        ([50 + i % 3 for i in range(64)], 3),
        ([0] * 63 + [3000], 11),
    ],
    ids=lambda it: f"{len(it)} of {max(it)}" if isinstance(it, list) else str(it),
)
def test_attend(
    made: dict[str, Any], tmp_path_factory: Any, name: str, contexts: list[int], num_ctas: int
) -> None:
    config, library = library_for(name, made, tmp_path_factory.mktemp("emulated"))
    heads, kv_heads, size, dtype_name = SIZES[name]
    dtype, num = getattr(torch, dtype_name), len(contexts)
    random = torch.Generator().manual_seed(num + num_ctas)
    counts = [-(-context // BLOCK) for context in contexts]
    blocks = 1 + torch.randperm(sum(counts), generator=random).int()
    table = torch.zeros(num, max(counts) + 3, dtype=torch.int32)
    for row, part in zip(table, blocks.split(counts), strict=True):
        row[: len(part)] = part
    lens = torch.tensor(contexts, dtype=torch.int32)
    last = (lens - 1).clamp(min=0)
    held = table.gather(1, (last // BLOCK)[:, None].long())[:, 0]
    args: Any = torch.arange(num), last, held * BLOCK + last % BLOCK, torch.arange(num + 1), lens
    batch = ForwardBatch(*args, table, torch.arange(num), is_decode=True)
    shape = (sum(counts) + 1, kv_heads, BLOCK, size)
    keys, values = (torch.randn(shape, generator=random).to(dtype) for _ in range(2))
    for row, context in enumerate(contexts):  # what is beyond a context is no number
        if context % BLOCK:
            block = int(table[row, context // BLOCK])
            keys[block, :, context % BLOCK :] = float("nan")
            values[block, :, context % BLOCK :] = float("nan")
    q_SQ = torch.randn((num, heads * size), generator=random).to(dtype)
    kinds = {"float32": torch.float32, "int32": torch.int32}
    arrays = {
        name: torch.zeros(shape, dtype=kinds[kind.name])
        for name, (kind, shape) in cuda_specs(config, 0).items()
        if name.startswith("attend_")
    }
    arrays["attend_pieces"].fill_(float("nan"))
    driver: Any = EmulatedDriver()
    found = Attend(library, driver, arrays, num_ctas)
    expected_SQ = expected(q_SQ, keys, values, table, contexts)
    is_there = lens > 0
    for _ in range(2):  # the second launch finds what the first one left
        out_SQ = torch.full((num + 1, heads * size), float("nan"), dtype=dtype)
        found.attend(q_SQ, batch, LayerCache(keys, values), out_SQ[:num])
        assert not arrays["attend_counts"].any()
        assert out_SQ[num].isnan().all() and not out_SQ[:num][~is_there].any()
        got_SQ = out_SQ[:num][is_there].float()
        tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        assert (got_SQ - expected_SQ[is_there]).norm() <= tolerance * expected_SQ.norm()


def expected(q_SQ: Tensor, keys: Tensor, values: Tensor, table: Tensor, contexts: list[int]) -> Any:
    _, kv_heads, _, size = keys.shape
    rows = []
    for seq, context in enumerate(contexts):
        if not context:
            rows.append(torch.zeros(q_SQ.shape[1]))
            continue
        blocks = table[seq, : -(-context // BLOCK)].long()
        k, v = (torch.cat(tuple(it[blocks].float()), 1)[:, :context] for it in (keys, values))
        q = q_SQ[seq].float().view(kv_heads, -1, size)
        rows.append(((q @ k.transpose(1, 2) / size**0.5).softmax(-1) @ v).reshape(-1))
    return torch.stack(rows)
