"""Read and write files of tensors, in safetensors' format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ditfastattn.core.errors import FileError
from ditfastattn.core.files import open_regular, write_bytes_atomically


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors``, so that ``path`` holds the old file or the whole new one.

    Raises:
        FileError: they cannot be written.
    """
    copies = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_bytes_atomically(path, save(copies))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors in ``path``.

    Raises:
        FileError: it is missing, damaged or of another format.
    """
    what = "cannot read the tensors"
    open_regular(path, what).close()
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise FileError(what, where=str(path), got=error) from error
