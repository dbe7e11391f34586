"""Collect the weights of all graphs of a bundle in one file, each content once."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import onnx
import torch
from onnx import TensorProto
from pydantic import Field
from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.files import naming_faults
from ditfastattn.core.records import Record
from ditfastattn.runtime.bundle.specs import Natural

INLINE_BYTES: Final = 1024  # smaller tensors stay in the graph
_PAGE: Final = 4096  # large tensors begin on a page, so that runtimes can map them
_WORD: Final = 64
_PART: Final = 2**24  # of a file that is read piece by piece

ONNX_TYPES: Final[dict[torch.dtype, int]] = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float64: TensorProto.DOUBLE,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int16: TensorProto.INT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}


def onnx_type(dtype: torch.dtype) -> int:
    """Return ONNX's name for ``dtype``.

    Raises:
        ConfigError: ONNX runtimes do not support it.
    """
    if dtype not in ONNX_TYPES:
        raise ConfigError(
            "this dtype cannot be exported",
            got=dtype,
            expected=", ".join(str(known).removeprefix("torch.") for known in ONNX_TYPES),
        )
    return ONNX_TYPES[dtype]


def raw_bytes(tensor: Tensor) -> bytes:
    """Return the content of ``tensor``, row by row, as ONNX stores it (little-endian)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.stride() != (1,):  # an expanded tensor of one element
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def inline_tensor(name: str, tensor: Tensor) -> TensorProto:
    """Return ``tensor`` as an initializer that holds its own bytes."""
    made = TensorProto(name=name, data_type=onnx_type(tensor.dtype), dims=list(tensor.shape))
    made.raw_data = raw_bytes(tensor)
    return made


class Place(Record, frozen=True):
    """Say where a tensor's content lies."""

    offset: Natural
    length: Natural


class Stored(Record, frozen=True):
    """Record what a file of weights holds: its size and hash, and each content's place by hash."""

    size: Natural
    sha256: str
    places: dict[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], Place]

    def holds(self, path: Path) -> bool:
        """Return whether the file in ``path`` begins with it, unchanged."""
        return path.is_file() and _hash_of_first(path, self.size).hexdigest() == self.sha256


def _hash_of_first(path: Path, size: int) -> Any:
    """Return the hash of the first ``size`` bytes of a file, to be continued."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0:
            part = file.read(min(size, _PART))
            if not part:
                break
            found.update(part)
            size -= len(part)
    return found


@dataclass
class Weights:
    """Append tensors to an open file; equal content is written once."""

    path: Path
    location: str  # as the graphs name it: relative to their folder
    size: int = 0
    _places: dict[str, Place] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Open an empty file, or continue after the first ``size`` bytes."""
        with naming_faults(self.path):
            self._file = self.path.open("r+b" if self.size else "wb")
            self._file.truncate(self.size)
            self._file.seek(self.size)
            self._hash = _hash_of_first(self.path, self.size)

    @classmethod
    def resumed(cls, path: Path, location: str, stored: Stored | None) -> Weights:
        """Continue the file that holds ``stored``, or start anew if there is none."""
        if stored is None:
            return cls(path, location)
        return cls(path, location, stored.size, dict(stored.places))

    def stored(self) -> Stored:
        """Return what ``resumed`` takes."""
        return Stored(size=self.size, sha256=self._hash.hexdigest(), places=self._places)

    def flush(self) -> None:
        """Make what was stored so far readable by others."""
        with naming_faults(self.path):
            self._file.flush()

    def sync(self) -> None:
        """Wait until what was stored so far is on the disk."""
        self.flush()
        with naming_faults(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with naming_faults(self.path):
            self._file.close()

    def store(self, name: str, tensor: Tensor) -> TensorProto:
        """Return an initializer called ``name`` that refers to the content of ``tensor``."""
        data = raw_bytes(tensor)
        key = hashlib.sha256(data).hexdigest()
        if key not in self._places:
            self._places[key] = self._append(data)
        place = self._places[key]
        made = TensorProto(name=name, data_type=onnx_type(tensor.dtype), dims=list(tensor.shape))
        made.data_location = TensorProto.EXTERNAL
        entries = {"location": self.location, "offset": place.offset, "length": place.length}
        for key_, item in entries.items():
            made.external_data.append(onnx.StringStringEntryProto(key=key_, value=str(item)))
        return made

    def _append(self, data: bytes) -> Place:
        alignment = _PAGE if len(data) >= _PAGE else _WORD
        padding = -self.size % alignment
        with naming_faults(self.path):
            for part in (b"\0" * padding, data):
                self._file.write(part)
                self._hash.update(part)
        place = Place(offset=self.size + padding, length=len(data))
        self.size = place.offset + place.length
        return place
