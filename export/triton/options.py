"""What a model of a Triton repository is to be, and whether it can be written."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from ditfastattn.core.errors import ConfigError

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class Backend(StrEnum):
    """Name the backend of the server that runs the graph."""

    ONNXRUNTIME = "onnxruntime"
    PYTHON = "python"  # with the onnxruntime package, for servers without the backend above


@dataclass(frozen=True)
class TritonOptions:
    """Choose what a model is called, and how it runs.

    Attributes:
        name: of the model; "" takes that of the bundle's folder.
        backend: what runs the graph.
        images: the most that are generated together.
    """

    name: str = ""
    backend: Backend = Backend.ONNXRUNTIME
    images: int = 4

    def __post_init__(self) -> None:
        """Check the number of images."""
        if self.images < 1:
            raise ConfigError(
                "at least one image is generated at a time",
                where="images",
                got=self.images,
                expected="1 or more",
            )


def check_repository(
    folder: str | os.PathLike[str], repository: str | os.PathLike[str], name: str = ""
) -> str:
    """Return the name of the model that the bundle in ``folder`` becomes.

    Raises:
        ConfigError: that is not a model's name; what is at ``repository`` is not a folder; or what
            writes configurations is not installed.
    """
    messages()
    found = name or Path(folder).absolute().name
    if not _NAME.fullmatch(found):
        raise ConfigError(
            "a model cannot have that name",
            where="the model's name, by default that of the bundle's folder",
            got=repr(found),
            expected="letters, digits, '_', '-' and '.'",
            remedy="choose another folder for the bundle, or name the model",
        )
    root = Path(repository)
    if root.exists() and not root.is_dir():
        raise ConfigError(
            "a model repository is a folder",
            where=str(root),
            got="a file",
            remedy="choose another path",
        )
    return found


def messages() -> tuple[Any, Any]:
    """Return the module of Triton's configuration messages, and that of their text.

    Raises:
        ConfigError: the package that has them is not installed.
    """
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise ConfigError(
            "the package that knows Triton's configuration is not installed",
            where="tritonclient",
            got=error,
            remedy="pip install 'ditfastattn[triton]'",
        ) from error
    return model_config_pb2, text_format
