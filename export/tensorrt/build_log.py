"""Read a builder's log: the engine's kernels, warnings and errors.

An engine cannot be opened without a GPU, but a builder that logs in detail lists the kernels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_KERNEL: Final = re.compile(r"Name: (?P<name>[^,]+), LayerType: (?P<kind>\w+)(?P<rest>.*)")
_INPUTS: Final = re.compile(r"Inputs: \[(?P<inputs>.*?)\](?:, Constants|, Outputs)")
_DIMENSIONS: Final = re.compile(r"Dimensions: \[(?P<sizes>[-\d,]*)\]")
_LAYERS: Final = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_EXPECTED: Final = ("Int64 binding",)  # harmless warnings


@dataclass(frozen=True)
class Kernel:
    """Describe one of an engine's kernels.

    Attributes:
        name: from the library.
        kind: from the library.
        shapes: of its inputs; -1 is a free size.
        nodes: the ONNX nodes that it computes, by name.
    """

    name: str
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    nodes: tuple[str, ...]

    @property
    def is_attention(self) -> bool:
        """Return whether it is a whole attention: product, softmax, product."""
        return "_mha" in self.name

    @property
    def queries(self) -> int:
        """Return the number of queries of an attention."""
        return self.shapes[0][1]

    @property
    def keys(self) -> int:
        """Return the number of keys that each query sees."""
        return self.shapes[1][2]


@dataclass(frozen=True)
class BuildLog:
    """Hold the kernels, and the messages that matter."""

    kernels: tuple[Kernel, ...]
    warnings: tuple[str, ...]
    errors: tuple[str, ...]

    @property
    def attentions(self) -> tuple[Kernel, ...]:
        """Return the kernels that are a whole attention each."""
        return tuple(kernel for kernel in self.kernels if kernel.is_attention)


def read_log(path: Path) -> BuildLog:
    """Read the log of one build, lines of ``SEVERITY: message``."""
    kernels: list[Kernel] = []
    messages: dict[str, list[str]] = {"WARNING": [], "ERROR": []}
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            severity, _, message = line.rstrip("\n").partition(": ")
            label = "ERROR" if severity.endswith("ERROR") else severity
            if label in messages:
                if not any(part in message for part in _EXPECTED):
                    messages[label].append(message)
            elif "LayerType: " in message:
                found = _kernel(message)
                kernels += [found] if found else []
    return BuildLog(tuple(kernels), tuple(messages["WARNING"]), tuple(messages["ERROR"]))


def _kernel(message: str) -> Kernel | None:
    found = _KERNEL.search(message)
    if found is None:
        return None
    inputs = _INPUTS.search(found["rest"])
    shapes = [
        tuple(int(size) for size in sizes.split(",") if size)
        for sizes in _DIMENSIONS.findall(inputs["inputs"] if inputs else "")
    ]
    nodes = tuple(_LAYERS.findall(found["rest"]))
    return Kernel(found["name"].strip(), found["kind"], tuple(shapes), nodes)
