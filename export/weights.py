"""Collect the weights of all graphs of a bundle in one file, each content once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import onnx
import torch
from onnx import TensorProto
from torch import Tensor

from ditfastattn.core.errors import ConfigError

INLINE_BYTES: Final = 1024  # smaller tensors stay in the graph
_PAGE: Final = 4096  # large tensors begin on a page, so that runtimes can map them
_WORD: Final = 64

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
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def inline_tensor(name: str, tensor: Tensor) -> TensorProto:
    """Return ``tensor`` as an initializer that holds its own bytes."""
    made = TensorProto(name=name, data_type=onnx_type(tensor.dtype), dims=list(tensor.shape))
    made.raw_data = raw_bytes(tensor)
    return made


@dataclass(frozen=True)
class _Place:
    offset: int
    length: int


@dataclass
class Weights:
    """Append tensors to an open file; equal content is written once."""

    path: Path
    location: str  # as the graphs name it: relative to their folder
    size: int = 0
    _places: dict[bytes, _Place] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Open an empty file, or continue after the first ``size`` bytes."""
        self._file = self.path.open("r+b" if self.size else "wb")
        self._file.truncate(self.size)
        self._file.seek(self.size)

    @classmethod
    def resumed(cls, path: Path, location: str, state: Mapping[str, Any]) -> Weights:
        """Resume from ``state``, or start anew if it is empty."""
        places = {
            bytes.fromhex(key): _Place(*place) for key, place in state.get("places", {}).items()
        }
        return cls(path, location, state.get("size", 0), places)

    def state(self) -> dict[str, Any]:
        """Return what ``resumed`` takes, as JSON."""
        places = {key.hex(): [p.offset, p.length] for key, p in self._places.items()}
        return {"size": self.size, "places": places}

    def flush(self) -> None:
        """Make what was stored so far readable by others."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def store(self, name: str, tensor: Tensor) -> TensorProto:
        """Return an initializer called ``name`` that refers to the content of ``tensor``."""
        data = raw_bytes(tensor)
        key = hashlib.sha256(data).digest()
        if key not in self._places:
            self._places[key] = self._append(data)
        place = self._places[key]
        made = TensorProto(name=name, data_type=onnx_type(tensor.dtype), dims=list(tensor.shape))
        made.data_location = TensorProto.EXTERNAL
        entries = {"location": self.location, "offset": place.offset, "length": place.length}
        for key_, item in entries.items():
            made.external_data.append(onnx.StringStringEntryProto(key=key_, value=str(item)))
        return made

    def _append(self, data: bytes) -> _Place:
        alignment = _PAGE if len(data) >= _PAGE else _WORD
        padding = -self.size % alignment
        self._file.write(b"\0" * padding)
        self._file.write(data)
        place = _Place(self.size + padding, len(data))
        self.size = place.offset + place.length
        return place
