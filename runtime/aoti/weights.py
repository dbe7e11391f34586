"""Open a bundle's weights file: tensors that all of its packages share."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.bundle.manifest import EXPORT_AGAIN


def open_weights(opened: str, path: Path, device: torch.device) -> dict[str, Tensor]:
    """Return the tensors of the file that ``opened`` opens and ``path`` names, for messages.

    Raises:
        ConfigError: it is not a safetensors file.
    """
    try:
        with safe_open(opened, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
    except SafetensorError as error:
        raise ConfigError(
            "the weights cannot be read", where=str(path), got=error, remedy=EXPORT_AGAIN
        ) from error
