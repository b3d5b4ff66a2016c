"""PyTorch's zip files (`.pth`, `.bin`) without PyTorch, and without running what they ask for.

A pickle is a program. `_Machine` runs it with a stack and a memo and no calls at all except three:
rebuilding a tensor, wrapping it as a parameter, and making an OrderedDict. Anything else is refused
by name. Tensors are arrays over the mapped file. Knows nothing of models.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from puna.checkpoint.fields import brief
from puna.checkpoint.mapped_file import MappedFile
from puna.checkpoint.stored import DenseTensor
from puna.errors import CheckpointError

_STORAGES: MappingProxyType[str, np.dtype[Any]] = MappingProxyType(
    {
        name: np.dtype(dtype)
        for name, dtype in {
            "FloatStorage": np.float32,
            "HalfStorage": np.float16,
            "BFloat16Storage": ml_dtypes.bfloat16,
            "DoubleStorage": np.float64,
            "ByteStorage": np.uint8,
            "CharStorage": np.int8,
            "ShortStorage": np.int16,
            "IntStorage": np.int32,
            "LongStorage": np.int64,
            "BoolStorage": np.bool_,
        }.items()
    }
)
_CALLS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")
_DICT = "collections.OrderedDict"

_MARK = object()
_PLAIN = frozenset({  # opcodes that push their argument
    "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINBYTES", "SHORT_BINBYTES",
})  # fmt: skip
_CONSTANTS = MappingProxyType({"NONE": None, "NEWTRUE": True, "NEWFALSE": False})


@dataclass(frozen=True)
class _Global:
    name: str  # module.attribute


@dataclass(frozen=True)
class _Storage:
    start: int  # byte in the file
    dtype: np.dtype[Any]
    label: str
    num_elements: int


def read_torch_zip(path: Path) -> dict[str, DenseTensor]:
    """Tensors of a state dict by their own names; CheckpointError if damaged or not plain."""
    file = MappedFile(path)
    if file.bytes(0, min(4, file.size))[:2] != b"PK":
        raise _no_zip(file)
    records = _records(file)
    pickles = [name for name in records if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise CheckpointError(f"{path} holds {len(pickles)} data.pkl; a PyTorch file has one")
    prefix = pickles[0][: -len("data.pkl")]
    if (order := records.get(prefix + "byteorder")) and file.bytes(*order) != b"little":
        raise CheckpointError(f"{path} is big endian; save it again on a little-endian machine")
    machine = _Machine(file, prefix, records)
    try:
        state = machine.run(file.bytes(*records[pickles[0]]))
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: its pickle is damaged ({brief(str(error), 120)}); download it again"
        ) from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds {brief(type(state).__name__)}, not a dict of tensors")
    others = [
        k for k, v in state.items() if not (isinstance(k, str) and isinstance(v, DenseTensor))
    ]
    if others:
        raise CheckpointError(
            f"{path} is no plain state dict: {brief(others[0])} is no tensor; save the "
            "model's state_dict() alone"
        )
    return state


def _no_zip(file: MappedFile) -> CheckpointError:
    if file.bytes(0, 1) == b"\x80":
        return CheckpointError(
            f"{file.path} is in PyTorch's format from before 1.6, which puna does not read; "
            "convert it with torch.save(torch.load(path), path), or use the safetensors form"
        )
    return CheckpointError(f"{file.path} is no PyTorch zip file; download it again")


def _records(file: MappedFile) -> dict[str, tuple[int, int]]:
    """(start, stop) of each record. zipfile reads the directory, local headers are read here."""
    try:
        with zipfile.ZipFile(file.path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise CheckpointError(
            f"{file.path} is cut short or damaged ({brief(str(error), 120)}); download it again"
        ) from None
    records = {}
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise file.damaged(f"{brief(info.filename)} is compressed; PyTorch never does that")
        header = file.bytes(info.header_offset, info.header_offset + 30)
        if header[:4] != b"PK\x03\x04":
            raise file.damaged(f"{brief(info.filename)} is not where the directory says")
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = info.header_offset + 30 + lengths
        if start + info.file_size > file.size:
            raise file.ends_early(start + info.file_size)
        records[info.filename] = (start, start + info.file_size)
    return records


class _Machine:
    """Runs one pickle. Never imports, never calls: a global is but a name that `_reduce` knows."""

    def __init__(self, file: MappedFile, prefix: str, records: dict[str, tuple[int, int]]) -> None:
        self.file = file
        self.prefix = prefix
        self.records = records
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        """What the pickle builds. ValueError and friends mean damage, CheckpointError a refusal."""
        stack, memo = self.stack, self.memo
        for opcode, arg, _ in pickletools.genops(io.BytesIO(program)):
            name = opcode.name
            if name in _PLAIN:
                stack.append(arg)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[int(arg or 0)] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[int(arg or 0)])
            elif name == "MARK":
                stack.append(_MARK)
            elif name == "EMPTY_DICT":
                stack.append({})
            elif name == "EMPTY_LIST":
                stack.append([])
            elif name == "EMPTY_TUPLE":
                stack.append(())
            elif name == "TUPLE":
                stack.append(tuple(self._to_mark()))
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                items = self._pop(int(name[-1]))
                stack.append(tuple(items))
            elif name in ("SETITEM", "SETITEMS"):
                items = self._pop(2) if name == "SETITEM" else self._to_mark()
                self._top(dict).update(zip(items[::2], items[1::2], strict=True))
            elif name in ("APPEND", "APPENDS"):
                items = self._pop(1) if name == "APPEND" else self._to_mark()
                self._top(list).extend(items)
            elif name == "GLOBAL":
                stack.append(self._global(*str(arg).split(" ", 1)))
            elif name == "STACK_GLOBAL":
                stack.append(self._global(*self._pop(2)))
            elif name == "REDUCE":
                function, args = self._pop(2)
                stack.append(self._reduce(function, args))
            elif name == "BINPERSID":
                stack.append(self._storage(*self._pop(1)))
            elif name == "BUILD":
                self._pop(1)  # attributes of an OrderedDict (`_metadata`): no weights
                self._top(dict)
            elif name == "STOP":
                return self._pop(1)[0]
            elif name not in ("PROTO", "FRAME"):
                raise self._refuse(f"uses pickle's {name}")
        raise ValueError("it does not end")

    def _pop(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        if len(items) < count or any(item is _MARK for item in items):
            raise ValueError("its stack runs empty")
        del self.stack[-count:]
        return items

    def _to_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"it fills a {type(self.stack[-1]).__name__} as a {kind.__name__}")
        return self.stack[-1]

    def _refuse(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file.path} {what}, which plain weights do not need; nothing was run. Use the "
            "safetensors form, or save the state_dict alone"
        )

    def _global(self, module: Any, attribute: Any) -> _Global:
        name = f"{module}.{attribute}"
        storage = name[len("torch.") :] if name.startswith("torch.") else ""
        if name not in (*_CALLS, _DICT) and storage not in _STORAGES:
            raise self._refuse(f"wants to call {brief(name)}")
        return _Global(name)

    def _reduce(self, function: Any, args: Any) -> Any:
        if not isinstance(function, _Global) or not isinstance(args, tuple):
            raise ValueError("it calls something that is no function")
        if function.name == _DICT:
            return dict(*args) if len(args) <= 1 else self._bad_call(function)
        if function.name == _CALLS[0] and len(args) >= 4:
            return self._tensor(*args[:4])
        if function.name == _CALLS[1] and args and isinstance(args[0], DenseTensor):
            return args[0]
        return self._bad_call(function)

    def _bad_call(self, function: _Global) -> Any:
        raise ValueError(f"it calls {function.name} with wrong arguments")

    def _storage(self, persistent_id: Any) -> _Storage:
        kind, storage_type, key, _, num_elements = persistent_id
        record = self.records.get(f"{self.prefix}data/{key}")
        if kind != "storage" or record is None:
            raise ValueError(f"record data/{key} is missing")
        label = storage_type.name[len("torch.") :]
        dtype = _STORAGES[label]
        if type(num_elements) is not int or num_elements < 0:
            raise ValueError("a storage has no size")
        if num_elements * dtype.itemsize > record[1] - record[0]:
            raise ValueError(f"record data/{key} is smaller than its {num_elements} elements")
        return _Storage(record[0], dtype, label, num_elements)

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> DenseTensor:
        sizes = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in sizes):
            raise ValueError("a tensor has no storage, or a negative size")
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        # The product check refuses stride 0: it makes any size out of a few bytes.
        num_elements = prod(shape)
        if len(shape) > 8 or num_elements > storage.num_elements:
            raise ValueError(f"a tensor of shape {brief(shape)} is larger than its storage")
        if num_elements and last >= storage.num_elements:
            raise ValueError(f"a tensor of shape {brief(shape)} reaches beyond its storage")
        start = storage.start + offset * storage.dtype.itemsize
        array = self.file.array(start, storage.dtype, tuple(shape), tuple(strides))
        return DenseTensor((array,), storage.label)
