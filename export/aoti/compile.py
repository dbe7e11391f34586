"""Compile one graph as an AOTInductor package, without its constants."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch._inductor.package.package import package_aoti
from torch.fx import GraphModule

from ditfastattn.core.errors import ConfigError

_NAMESPACES: Final = ("aten", "prims", "quantized", "onednn", "mkldnn")  # of libtorch itself


def compile_package(
    module: GraphModule, examples: Sequence[Tensor], options: Mapping[str, Any], where: str = ""
) -> bytes:
    """Return a package that computes ``module``, for inputs with the strides of ``examples``.

    ``where`` names it in messages.

    Raises:
        ConfigError: an operator has no C++ form, or compiling fails.
    """
    try:
        with torch.no_grad():
            files: Any = torch._inductor.aot_compile(module, tuple(examples), options=dict(options))
    except Exception as error:  # Inductor, its C++ compiler, the file system
        raise ConfigError(
            "torch cannot compile the graph",
            where=where,
            got=str(error).strip()[:2000],
            remedy="install a C++ compiler (g++); report a bug if one is installed",
        ) from error
    _check_operators(files, where)
    content = io.BytesIO()
    package_aoti(content, files)
    return content.getvalue()


def _check_operators(files: Sequence[str], where: str) -> None:
    """Refuse calls of operators that libtorch lacks: only this Python process knows them."""
    for file in files:
        if not str(file).endswith(".wrapper.json"):
            continue
        nodes = json.loads(Path(file).read_text())["nodes"]
        targets = {str(node["node"]["target"]) for node in nodes}
        unknown = sorted(name for name in targets if _namespace(name) not in _NAMESPACES)
        if unknown:
            raise ConfigError(
                "operators that only Python knows",
                where=where,
                got=", ".join(unknown),
                remedy="write the model without them",
            )


def _namespace(target: str) -> str:
    """Return ``aten`` of ``torch.ops.aten.sort.default`` or of ``aten::sort``."""
    return target.removeprefix("torch.ops.").replace("::", ".").partition(".")[0]
