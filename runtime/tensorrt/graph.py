"""Run one TensorRT engine on torch tensors, without copies, on torch's stream."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditfastattn.core.errors import ConfigError, EngineError
from ditfastattn.runtime.tensorrt.library import Library


class TensorRTGraph:
    """Hold an engine, and run it on tensors in the order of ``inputs`` and ``outputs``.

    Each thread has an execution context of its own; all work is queued on the thread's current
    stream, and nothing waits for it.
    """

    def __init__(
        self,
        library: Library,
        path: Path,
        content: bytes,
        inputs: Sequence[str],
        outputs: Sequence[str],
        device: torch.device,
    ) -> None:
        """Load the engine whose ``content`` was read from ``path``, and checked.

        Raises:
            ConfigError: TensorRT refuses it, or its inputs or outputs are not these.
        """
        trt = library.module
        self._log = trt.Logger(trt.Logger.WARNING)
        self._runtime = trt.Runtime(self._log)  # must outlive the engine
        engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise ConfigError(
                "TensorRT refuses the engine",
                where=str(path),
                expected=f"an engine of {library.name} {library.version} for {_gpu(device)}",
                remedy="build it again on this machine (`ditfastattn build`)",
            )
        present = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        if present != {*inputs, *outputs}:
            raise ConfigError(
                "the engine's inputs and outputs differ from its bundle's",
                where=str(path),
                got=", ".join(sorted(present)),
                expected=", ".join(sorted({*inputs, *outputs})),
                remedy="build it again (`ditfastattn build`)",
            )
        self._engine, self._path, self._device = engine, path, device
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self._threads = threading.local()

    @property
    def device(self) -> torch.device:
        """Return where the tensors must be."""
        return self._device

    def __call__(self, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Queue a run from ``tensors`` into ``results``, which are contiguous.

        Raises:
            EngineError: TensorRT refused a shape, or failed.
        """
        context = self._context()
        kept = [tensor.contiguous() for tensor in tensors]
        for name, tensor in zip(self._inputs, kept, strict=True):
            # The context refuses sizes outside the engine's profile.
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise EngineError(
                    f"{self._path}: the engine was not built for {name!r} of shape "
                    f"{list(tensor.shape)}; build it for more images (--images)"
                )
            context.set_tensor_address(name, tensor.data_ptr())
        for name, tensor in zip(self._outputs, results, strict=True):
            context.set_tensor_address(name, tensor.data_ptr())
        if not context.execute_async_v3(_stream(self._device)):
            raise EngineError(f"{self._path}: TensorRT failed; its messages are on stderr")

    def _context(self) -> Any:
        if not hasattr(self._threads, "context"):
            self._threads.context = self._engine.create_execution_context()
        return self._threads.context


class CudaGraph:
    """Replay an engine's kernels as one CUDA graph, which saves the host their launches.

    A CUDA graph is bound to memory addresses, so inputs are copied into its tensors, and outputs
    out of them. It is captured once per set of shapes and thread.
    """

    def __init__(self, graph: TensorRTGraph) -> None:
        """Wrap the engine's graph."""
        self._graph = graph
        self._threads = threading.local()

    def __call__(self, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Run as ``TensorRTGraph`` does."""
        if not hasattr(self._threads, "captured"):
            self._threads.captured = {}
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        captured: dict[Any, _Captured] = self._threads.captured
        if shapes not in captured:
            captured[shapes] = _Captured(self._graph, tensors, results)
        captured[shapes](tensors, results)


class _Captured:
    def __init__(
        self, graph: TensorRTGraph, tensors: Sequence[Tensor], results: Sequence[Tensor]
    ) -> None:
        self._inputs = [tensor.clone().contiguous() for tensor in tensors]
        self._outputs = [torch.empty_like(result) for result in results]
        graph(self._inputs, self._outputs)  # the first run allocates, which a capture must not
        torch.cuda.current_stream(graph.device).synchronize()
        self._replayed = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._replayed):
            graph(self._inputs, self._outputs)

    def __call__(self, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        for own, given in zip(self._inputs, tensors, strict=True):
            own.copy_(given, non_blocking=True)
        self._replayed.replay()
        for result, own in zip(results, self._outputs, strict=True):
            result.copy_(own, non_blocking=True)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
