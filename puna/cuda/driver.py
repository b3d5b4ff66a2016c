"""The CUDA driver by ctypes: modules, functions, launches, and what the GPU says of itself.

The few calls of libcuda.so.1 that puna needs, declared by hand; contexts and streams are torch's.
Knows nothing of kernels' names or arguments.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

from puna.errors import EngineError

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SHARED_CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
_PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_MULTIPROCESSORS = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_TENSOR_MAP_BYTES = 128
_TENSOR_MAP_SWIZZLE_128B = 3
_TENSOR_MAP_UINT16 = 1  # CU_TENSOR_MAP_DATA_TYPE_UINT16
_DEFAULT_SHARED = 48 * 1024  # what a launch may have without being asked for


class _AttributeValue(ctypes.Union):
    _fields_ = (("flag", ctypes.c_int), ("bytes", ctypes.c_char * 64))


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (
        ("id", ctypes.c_uint),
        ("padding", ctypes.c_char * 4),
        ("value", _AttributeValue),
    )


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z")),
        *((name, ctypes.c_uint) for name in ("block_x", "block_y", "block_z")),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a GPU says of itself."""

    name: str
    capability: tuple[int, int]
    num_multiprocessors: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class TensorMap:
    """A CUtensorMap, which a launch copies."""

    memory: ctypes.Array[ctypes.c_char]
    address: int


@dataclass(frozen=True, slots=True)
class Function:
    """An entry of a loaded module, which stays loaded as long as the process lives."""

    handle: int
    num_threads: int
    shared_bytes: int


class Driver:
    """libcuda.so.1, initialised."""

    def __init__(self) -> None:
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise EngineError(
                f"no NVIDIA driver is here ({error}): install it, or build the engine with "
                "--target cpu"
            ) from error
        self._check(self._cuda.cuInit(0), "the driver cannot be initialised")

    def version(self) -> tuple[int, int]:
        """The newest CUDA version that the driver runs."""
        found = ctypes.c_int()
        self._check(self._cuda.cuDriverGetVersion(ctypes.byref(found)), "no driver version")
        return found.value // 1000, found.value % 1000 // 10

    def num_gpus(self) -> int:
        found = ctypes.c_int()
        self._check(self._cuda.cuDeviceGetCount(ctypes.byref(found)), "no count of GPUs")
        return found.value

    def gpu(self, index: int) -> Gpu:
        device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
        total = ctypes.c_size_t()
        self._check(self._cuda.cuDeviceGet(ctypes.byref(device), index), f"no GPU {index}")
        self._check(self._cuda.cuDeviceGetName(name, len(name), device), "no name")
        self._check(self._cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device), "no memory size")

        def attribute(number: int) -> int:
            found = ctypes.c_int()
            result = self._cuda.cuDeviceGetAttribute(ctypes.byref(found), number, device)
            self._check(result, f"no attribute {number}")
            return found.value

        capability = attribute(_CAPABILITY_MAJOR), attribute(_CAPABILITY_MINOR)
        return Gpu(name.value.decode(), capability, attribute(_MULTIPROCESSORS), total.value)

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the current context's GPU."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        result = self._cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        self._check(result, "no memory info")
        return free.value, total.value

    def load(self, cubin: bytes, what: str) -> int:
        """A module in the current context. `what` names it in errors."""
        module = ctypes.c_void_p()
        result = self._cuda.cuModuleLoadData(ctypes.byref(module), cubin)
        self._check(result, f"{what} cannot be loaded")
        assert module.value is not None
        return module.value

    def function(
        self, module: int, entry: str, num_threads: int, shared_bytes: int, most_shared: int
    ) -> Function:
        """An entry of a module, to be launched with `shared_bytes` of dynamic shared memory;
        `most_shared`: with which it is ever launched."""
        handle = ctypes.c_void_p()
        result = self._cuda.cuModuleGetFunction(
            ctypes.byref(handle), ctypes.c_void_p(module), entry.encode()
        )
        self._check(result, f"kernel {entry} is not in its module")
        # As much shared memory as there is, for all alike: kernels that divide a multiprocessor
        # differently cannot be on it at the same time, and so could not overlap.
        attributes = [(_SHARED_CARVEOUT, 100)]
        if most_shared > _DEFAULT_SHARED:
            attributes.append((_MAX_DYNAMIC_SHARED, most_shared))
        for attribute, value in attributes:
            result = self._cuda.cuFuncSetAttribute(handle, attribute, ctypes.c_int(value))
            self._check(result, f"kernel {entry} wants {most_shared} bytes of shared memory")
        assert handle.value is not None
        return Function(handle.value, num_threads, shared_bytes)

    def tensor_map(
        self,
        address: int,
        dims: tuple[int, ...],
        box: tuple[int, ...],
        *,
        strides: tuple[int, ...] | None = None,
        is_swizzled: bool = False,
    ) -> TensorMap:
        """Describe two-byte numbers for copies of boxes; three to five dimensions, the innermost
        first. `strides`: numbers from one to the next of each dimension but the first, multiples of
        eight; None: contiguous.

        `is_swizzled`: in shared memory, 16-byte piece i of row r of a box lies where piece
        i ^ (r % 8) would; rows are 128 bytes.
        """
        # Aligned to 64 bytes, within memory that the map keeps alive.
        memory = (ctypes.c_char * (_TENSOR_MAP_BYTES + 64))()
        aligned = -(-ctypes.addressof(memory) // 64) * 64
        num_dims = len(dims)
        strides = strides or tuple(math.prod(dims[:i]) for i in range(1, num_dims))
        result = self._cuda.cuTensorMapEncodeTiled(
            ctypes.c_void_p(aligned),
            _TENSOR_MAP_UINT16,
            num_dims,
            ctypes.c_void_p(address),
            (ctypes.c_uint64 * num_dims)(*dims),
            (ctypes.c_uint64 * (num_dims - 1))(*(2 * stride for stride in strides)),
            (ctypes.c_uint32 * num_dims)(*box),
            (ctypes.c_uint32 * num_dims)(*[1] * num_dims),
            0,  # not interleaved
            _TENSOR_MAP_SWIZZLE_128B if is_swizzled else 0,
            0,  # L2 fetches no more than is asked for: to fetch 256 bytes cost 5 % (H200, 2026-11)
            0,  # zeros beyond the edges
        )
        self._check(result, f"no tensor map of {dims} in boxes of {box}")
        return TensorMap(memory, aligned)

    def launch(
        self,
        function: Function,
        grid: tuple[int, int, int],
        arguments: ctypes.Array[ctypes.c_void_p],
        stream: int,
        *,
        is_programmatic: bool = False,
    ) -> None:
        """Launch on a stream. `arguments` point to each parameter.

        `is_programmatic`: the kernel may begin before those before it have ended, and waits for
        them itself (griddepcontrol.wait): only for kernels that do.
        """
        config = _LaunchConfig(*grid, function.num_threads, 1, 1, function.shared_bytes, stream)
        if is_programmatic:
            attribute = _Attribute(_PROGRAMMATIC_SERIALIZATION)
            attribute.value.flag = 1
            config.attributes, config.num_attributes = ctypes.pointer(attribute), 1
        result = self._cuda.cuLaunchKernelEx(
            ctypes.byref(config), ctypes.c_void_p(function.handle), arguments, None
        )
        self._check(result, "a kernel cannot be launched")

    def _check(self, result: int, what: str) -> None:
        """EngineError with the driver's own words unless `result` is CUDA_SUCCESS."""
        if result:
            words = ctypes.c_char_p()
            self._cuda.cuGetErrorString(result, ctypes.byref(words))
            said = (words.value or b"no description").decode()
            raise EngineError(f"CUDA: {what}: {said} (error {result})")
