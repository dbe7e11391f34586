"""Read and write files of tensors, in safetensors' format."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ditfastattn.core.errors import FileError
from ditfastattn.core.files import open_regular, write_bytes_atomically

_HASH: Final = "sha256"  # of all names, dtypes, shapes and content


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors``, so that ``path`` holds the old file or the whole new one.

    Raises:
        FileError: they cannot be written.
    """
    copies = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_bytes_atomically(path, save(copies, {_HASH: _hash_of(copies)}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors in ``path``.

    Raises:
        FileError: it is missing, damaged or of another format.
    """
    what = "cannot read the tensors"
    open_regular(path, what).close()
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            written = (file.metadata() or {}).get(_HASH)
    except (OSError, SafetensorError) as error:
        raise FileError(what, where=str(path), got=error) from error
    if written != _hash_of(tensors):
        raise FileError(what, where=str(path), got="content that was changed since it was written")
    return tensors


def _hash_of(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].cpu()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
