"""PyTorch weights: checkpoint files read without PyTorch."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np


def read_checkpoint(file: BinaryIO) -> dict[str, np.ndarray]:
    """Read a state dict written by `torch.save` before PyTorch 1.6, without PyTorch and without running its pickle.

    The file is five pickles (magic number, protocol version, system, state dict, storage keys), then for each key an
    int64 count and so many little-endian values (`torch.serialization._legacy_load`). Only what a state dict of
    floats and int64s needs may stand in the pickles; everything else is refused.

    Args:
        file: opened for reading bytes.

    Returns:
        Name → array, in the file's order. Arrays are views, with PyTorch's strides, of the storages read.

    Raises:
        ValueError: it is no such file, is cut short, or its pickle asks for anything but tensors.
    """
    storages: dict[str, _Storage] = {}
    try:
        magic, version, system, state, keys = (_TensorUnpickler(file, storages).load() for _ in range(5))
    except ValueError:
        raise
    except Exception as error:  # pickle raises whatever a damaged stream leads it to
        raise ValueError(f"not a PyTorch checkpoint of the old format ({type(error).__name__})") from error
    if magic != _MAGIC or version != _PROTOCOL or not isinstance(system, dict) or not system.get("little_endian"):
        raise ValueError("not a PyTorch checkpoint of the old format")
    if not isinstance(keys, list) or set(keys) != set(storages):
        raise ValueError("its storages are not those of its tensors")
    for key in keys:
        storages[key].read(file)
    if not isinstance(state, dict) or not all(isinstance(tensor, _Tensor) for tensor in state.values()):
        raise ValueError("it holds something that is no tensor")
    return {str(name): tensor.view() for name, tensor in state.items()}


_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


class _Storage:
    """A run of values that tensors are views of."""

    def __init__(self, dtype: np.dtype, count: int) -> None:
        self.dtype, self.count = dtype, count
        self.values = np.empty(0, dtype)

    def read(self, file: BinaryIO) -> None:
        header = file.read(8)
        size = self.count * self.dtype.itemsize
        if len(header) != 8 or int.from_bytes(header, "little", signed=True) != self.count:
            raise ValueError("it is cut short or damaged")
        data = file.read(size)
        if len(data) != size:
            raise ValueError("it is cut short")
        self.values = np.frombuffer(data, self.dtype)


@dataclass(frozen=True)
class _Tensor:
    """A strided view of a storage that has not been read yet."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self) -> np.ndarray:
        numbers = (self.offset, *self.shape, *self.strides)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        # as_strided trusts its caller, so a view that leaves its storage is caught here.
        if min(numbers) < 0 or (0 not in self.shape and last >= self.storage.count):
            raise ValueError("a tensor reaches beyond its storage")
        steps = [step * self.storage.dtype.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(self.storage.values[self.offset :], self.shape, steps, writeable=False)


def _rebuild_tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> _Tensor:
    """Stands for `torch._utils._rebuild_tensor_v2`."""
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or not all(type(n) is int for n in numbers) or len(shape) != len(strides):
        raise ValueError("it holds a tensor that cannot be read")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


_ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    # Types as text, which a pickle can't call.
    ("torch", "FloatStorage"): "<f4",
    ("torch", "LongStorage"): "<i8",
}


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles state dicts only: a pickle can call whatever it names, so it may name four things."""

    def __init__(self, file: BinaryIO, storages: dict[str, _Storage]) -> None:
        super().__init__(file)
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ValueError(f"its pickle asks for {module}.{name}, which is refused")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        tag, kind, key, _device, count, view = pid
        if tag != "storage" or kind not in ("<f4", "<i8") or type(count) is not int or count < 0 or view:
            raise ValueError("it holds a storage that cannot be read")
        return self._storages.setdefault(key, _Storage(np.dtype(kind), count))
