"""Write the graphs of a bundle: as ONNX, or as whatever else answers to ``GraphFiles``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ditfastattn.core.files import write_bytes_atomically
from ditfastattn.export.lint import lint
from ditfastattn.export.partial import WEIGHTS_FILE, PartialBundle
from ditfastattn.export.step_graphs import Form, StepGraph, describe, onnx_form, write_graph
from ditfastattn.passes.graph.ir import graph_text
from ditfastattn.runtime.bundle.packages import PackagesSpec
from ditfastattn.runtime.bundle.specs import VariantSpec

Written = Callable[[str], None]


class GraphFiles(Protocol):
    """Write graphs into the folder of a bundle, each unless an interrupted export has.

    Attributes:
        suffix: of the files' names.
    """

    suffix: str

    @property
    def form(self) -> Form:
        """Return what brings a graph into the form that it is written in."""
        ...

    def write(self, graph: StepGraph, file: str, about: Mapping[str, str]) -> VariantSpec:
        """Write ``graph``, at the latest when it is closed; return its entry in the manifest.

        ``about`` says what it is, where a format has a place for that.
        """
        ...

    def close(self) -> str:
        """Write what is left, and end writing weights; return the name of their file."""
        ...

    def packages(self) -> PackagesSpec | None:
        """Return what was compiled, if anything was."""
        ...


class OnnxFiles:
    """Write graphs as ONNX, which refers to one file of weights."""

    suffix = "onnx"

    @property
    def form(self) -> Form:
        """Return what decomposes a graph into what ONNX has."""
        return onnx_form

    def __init__(self, partial: PartialBundle, written: Written) -> None:
        """Take the folder; ``written`` is called with the file of each graph."""
        self._partial, self._written = partial, written

    def write(self, graph: StepGraph, file: str, about: Mapping[str, str]) -> VariantSpec:
        """Write ``graph``; return its entry in the manifest."""
        partial = self._partial
        key = hashlib.sha256(graph_text(graph.source.module.graph).encode()).hexdigest()
        if not partial.has(file, key):
            name = file.removesuffix(".onnx")
            self.save(write_graph(graph, partial.weights, name, about), file)
            partial.keep(file, key)
        self._written(file)
        return describe(graph, partial.folder / file)

    def save(self, model: Any, file: str) -> None:
        """Write ``model``, and check it as runtimes will read it."""
        path = self._partial.folder / file
        write_bytes_atomically(path, model.SerializeToString())
        self._partial.weights.flush()
        lint(path)

    def close(self) -> str:
        """End writing weights; return the name of their file."""
        self._partial.close()
        return WEIGHTS_FILE

    def packages(self) -> None:
        """Return nothing: ONNX is not compiled."""
