"""Run one ONNX graph of a bundle by OpenVINO on torch tensors."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from ditfastattn.core.errors import ConfigError, EngineError
from ditfastattn.runtime.bundle.graph_file import GraphFile

_INSTALL: Final = 'pip install "ditfastattn[openvino]"'


@cache
def _core() -> Any:
    try:
        import openvino  # type: ignore[import-untyped,unused-ignore]  # an extra
    except ImportError as error:
        raise ConfigError("OpenVINO is not installed", got=error, remedy=_INSTALL) from error
    return openvino.Core()


class OpenVinoGraph:
    """Hold a compiled graph, and run it on tensors in the order of ``inputs`` and ``outputs``.

    OpenVINO opens graph and weights by their names: whoever loads a bundle checks afterwards that
    these are the files that were checked.
    """

    device = torch.device("cpu")
    providers = ("OpenVINO CPU",)

    def __init__(
        self, graph: GraphFile, inputs: Sequence[str], outputs: Sequence[str], threads: int
    ) -> None:
        """Compile the graph for the CPU.

        Raises:
            ConfigError: OpenVINO is not installed, or refuses the graph.
        """
        # By default a CPU that has bfloat16 computes fp32 graphs in that.
        options: dict[str, Any] = {"EXECUTION_MODE_HINT": "ACCURACY"}
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        core = _core()
        try:
            self._compiled = core.compile_model(core.read_model(str(graph.path)), "CPU", options)
        except RuntimeError as error:
            raise ConfigError(
                "OpenVINO refuses the graph",
                where=str(graph.path),
                got=error,
                remedy='load it by ONNX Runtime: runtime="onnx"',
            ) from error
        self._path, self._inputs = graph.path, tuple(inputs)
        self._outputs = [self._compiled.output(name) for name in outputs]
        self._requests = threading.local()  # one per thread: a request holds its tensors

    def __call__(self, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Run from ``tensors`` into ``results``.

        Raises:
            EngineError: OpenVINO failed.
        """
        request = getattr(self._requests, "held", None)
        if request is None:
            request = self._requests.held = self._compiled.create_infer_request()
        arrays = [tensor.detach().contiguous().numpy() for tensor in tensors]
        given = dict(zip(self._inputs, arrays, strict=True))
        try:
            found = request.infer(given, share_inputs=True, share_outputs=True)
        except RuntimeError as error:
            raise EngineError(f"{self._path}: OpenVINO failed: {error}") from error
        for output, result in zip(self._outputs, results, strict=True):
            result.copy_(torch.from_numpy(found[output]))
