"""Meta's own format: params.json and consolidated.NN.pth, one file per model-parallel rank.

Decides how shards join, what params.json leaves open, and whether the output matrix is the
embedding. Shards are joined when a slice is read, never as a whole.
"""

from __future__ import annotations

from math import isclose
from pathlib import Path
from types import MappingProxyType

from puna.checkpoint.fields import Fields, brief, read_json
from puna.checkpoint.hf import read_tokenizer_files
from puna.checkpoint.names import NameMap
from puna.checkpoint.pickle_reader import read_torch_zip
from puna.checkpoint.stored import DenseTensor, FileCheckpoint, require_readable
from puna.errors import CheckpointError
from puna.spec import GenerationDefaults, ModelSpec, RopeSpec

NAMES = NameMap(
    MappingProxyType(
        {
            "tok_embeddings.weight": "embed.weight",
            "norm.weight": "norm.weight",
            "output.weight": "head.weight",
        }
    ),
    "layers",
    MappingProxyType(
        {
            "attention_norm": "attn_norm",
            "ffn_norm": "mlp_norm",
            "attention.wq": "attn.q",
            "attention.wk": "attn.k",
            "attention.wv": "attn.v",
            "attention.wo": "attn.o",
            "feed_forward.w1": "mlp.gate",
            "feed_forward.w3": "mlp.up",
            "feed_forward.w2": "mlp.down",
        }
    ),
)
_CHUNK_ROWS = 256


def open_meta(directory: Path, source: str) -> FileCheckpoint:
    """Open a directory; `source` is what the user called it. Raises CheckpointError."""
    params = read_json(directory / "params.json")
    files = _shard_files(directory)
    shards = [read_torch_zip(path) for path in files]
    for path, shard in zip(files[1:], shards[1:], strict=True):
        if odd := sorted(shard.keys() ^ shards[0].keys()):
            raise CheckpointError(
                f"{path} and {files[0].name} differ: only one has {brief(odd[0])}"
            )
    hidden_size = params.whole("dim", smallest=1)
    num_heads = params.whole("n_heads", smallest=1)
    if hidden_size % num_heads:
        raise CheckpointError(
            f"{params.where}: dim ({hidden_size}) is not a multiple of n_heads ({num_heads})"
        )
    head_dim = hidden_size // num_heads
    tensors: dict[str, DenseTensor] = {}
    canonical = []
    for file_name in shards[0]:
        if file_name.endswith("rope.freqs"):
            continue  # follows from rope_theta
        name = NAMES.canonical(file_name)
        parts = [shard[file_name] for shard in shards]
        tensors[name or file_name] = _join(
            directory, name or "", file_name, parts, hidden_size, head_dim
        )
        if name:
            canonical.append(name)
    require_readable(tensors, source, sorted(canonical))
    _check_shard_count(directory, files, shards, hidden_size)
    is_tied = "head.weight" not in tensors or _is_equal(tensors, "embed.weight", "head.weight")
    if is_tied:
        tensors.pop("head.weight", None)
    spec, notes = _spec(params, tensors, is_tied)
    return FileCheckpoint(
        kind="meta",
        source=source,
        spec=spec,
        generation=GenerationDefaults(),
        tensors=tensors,
        read_tokenizer=lambda: _tokenizer(directory),
        weight_files=(directory / "params.json", *files),
        remarks=tuple(notes),
    )


def _shard_files(directory: Path) -> list[Path]:
    found = sorted(directory.glob("consolidated.*.pth"))
    if not found:
        raise CheckpointError(
            f"{directory} has a params.json and no consolidated.00.pth; download it"
        )
    expected = [directory / f"consolidated.{i:02}.pth" for i in range(len(found))]
    if found != expected:
        missing = next(path.name for path in expected if path not in found)
        raise CheckpointError(f"{directory} has {len(found)} shards and no {missing}; download it")
    return found


def _join(
    directory: Path,
    name: str,
    file_name: str,
    parts: list[DenseTensor],
    hidden_size: int,
    head_dim: int,
) -> DenseTensor:
    """One tensor of its shards.

    Meta splits q, k, v, gate, up and head by rows, o and down by columns; the embedding by columns
    until Llama 2 and by rows from Llama 3 on; norms are whole in each shard.
    """
    first = parts[0]
    kind = name.removesuffix(".weight").rpartition(".")[2]
    if len({(part.label, part.shape) for part in parts}) > 1:
        raise CheckpointError(
            f"{directory}: the shards of {brief(file_name)} differ in shape or type"
        )
    num_dims = len(first.shape)
    if len(parts) == 1 or not name or num_dims < 2:
        parts, axis = parts[:1], 0
    elif kind == "embed":
        axis = 0 if first.shape[1] == hidden_size else 1
    else:
        axis = 1 if kind in ("o", "down") else 0
    is_rotary = kind in ("q", "k") and num_dims == 2
    if is_rotary and (num_rows := first.shape[0] * len(parts)) % head_dim:
        raise CheckpointError(
            f"{directory}: {file_name} has {num_rows} rows; needed a multiple of the head size "
            f"{head_dim} (dim / n_heads of params.json)"
        )
    arrays = tuple(part.parts[0] for part in parts)
    return DenseTensor(arrays, first.label, axis, head_dim if is_rotary else 0)


def _check_shard_count(
    directory: Path, files: list[Path], shards: list[dict[str, DenseTensor]], hidden_size: int
) -> None:
    """The query projection tells how many ranks there were: its rows are dim / ranks."""
    query = shards[0].get("layers.0.attention.wq.weight")
    if query is None or not query.shape or not query.shape[0]:
        return
    num_shards, rest = divmod(hidden_size, query.shape[0])
    if num_shards != len(files) or rest:
        raise CheckpointError(
            f"{directory} has {len(files)} shards, and its tensors were split in "
            f"{hidden_size / query.shape[0]:g}; download all consolidated.NN.pth"
        )


def _is_equal(tensors: dict[str, DenseTensor], name: str, other: str) -> bool:
    """Whether two matrices are the same bits, a few rows at a time until the first difference."""
    if name not in tensors or tensors[name].shape != tensors[other].shape:
        return False
    a, b = tensors[name], tensors[other]
    if len(a.shape) != 2 or a.format != b.format:
        return False
    chunks = (slice(i, i + _CHUNK_ROWS) for i in range(0, a.shape[0], _CHUNK_ROWS))
    every = slice(None)
    return all(a.load(c, every).tobytes() == b.load(c, every).tobytes() for c in chunks)


def _spec(
    params: Fields, tensors: dict[str, DenseTensor], is_tied: bool
) -> tuple[ModelSpec, list[str]]:
    def rows(name: str) -> int:
        if name not in tensors:
            raise CheckpointError(f"{params.where}: the shards beside it hold no {name}")
        return tensors[name].shape[0]

    notes = []
    hidden_size, num_heads = params.whole("dim"), params.whole("n_heads")
    vocab_size = params.whole("vocab_size", -1, smallest=-1)
    vocab_size = rows("embed.weight") if vocab_size <= 0 else vocab_size
    intermediate_size = rows("layers.0.mlp.gate.weight")
    expected = _ffn_formula(params, hidden_size)
    if expected and expected != intermediate_size:
        notes.append(
            f"params.json gives a feed-forward size of {expected}, the tensors have "
            f"{intermediate_size}: {intermediate_size}"
        )
    eps = params.number("norm_eps", 1e-5)
    rope, rope_notes = _rope(params, hidden_size, is_tied)
    spec = ModelSpec(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=params.whole("n_layers", smallest=1),
        num_heads=num_heads,
        num_kv_heads=params.whole("n_kv_heads", num_heads, smallest=1),
        head_dim=hidden_size // num_heads,
        vocab_size=vocab_size,
        max_position_embeddings=_max_positions(vocab_size, eps, rope),
        rms_norm_eps=eps,
        rope=rope,
        tie_word_embeddings=is_tied,
    )
    notes.append(
        f"params.json gives no context length: {spec.max_position_embeddings}, as models of "
        "this vocabulary, norm_eps and RoPE have"
    )
    return spec, notes + rope_notes


def _ffn_formula(params: Fields, hidden_size: int) -> int | None:
    """Meta's rule: two thirds of 4 * dim, times a multiplier, rounded up to a multiple."""
    multiple = params.whole("multiple_of", None, smallest=1)
    if multiple is None:
        return None
    size = int(8 * hidden_size / 3)
    size = int(params.number("ffn_dim_multiplier", 1.0) * size)
    return -(-size // multiple) * multiple


def _rope(params: Fields, hidden_size: int, is_tied: bool) -> tuple[RopeSpec, list[str]]:
    theta = params.number("rope_theta", 10000.0)
    if not params.flag("use_scaled_rope", False):
        return RopeSpec(theta=theta), []
    # The small Llama 3.2 models were trained with factor 32; not every params.json says so.
    is_small = is_tied and hidden_size <= 3072
    factor = params.number("rope_scaling_factor", 32.0 if is_small else 8.0)
    notes = []
    if not params.has("rope_scaling_factor"):
        notes.append(
            f"params.json gives no RoPE scaling factor: {factor:g}, as in Llama "
            f"{'3.2' if is_small else '3.1'}"
        )
    high = params.number("rope_high_freq_factor", 4.0)
    return RopeSpec(theta, "llama3", factor, 8192, 1.0, high), notes


def _max_positions(vocab_size: int, eps: float, rope: RopeSpec) -> int:
    if rope.type == "llama3":
        return 131072
    if vocab_size >= 128000:
        return 8192
    return 2048 if isclose(eps, 1e-6) else 4096


def _tokenizer(directory: Path) -> dict[str, bytes]:
    """Meta puts tokenizer.model beside the shards, or one folder up for all sizes of a model."""
    names = ("tokenizer.model",)
    return read_tokenizer_files(directory, names) or read_tokenizer_files(
        directory.resolve().parent, names
    )
