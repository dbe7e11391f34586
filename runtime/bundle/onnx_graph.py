"""Run one ONNX graph of a bundle on torch tensors, without copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ditfastattn.core.errors import ConfigError, EngineError
from ditfastattn.runtime.bundle.graph_file import INSTALL, GraphFile
from ditfastattn.runtime.bundle.specs import ELEMENT_TYPES

_ON_CUDA = (
    "CUDAExecutionProvider",
    "TensorrtExecutionProvider",
    "NvTensorRTRTXExecutionProvider",
)


@dataclass(frozen=True)
class SessionOptions:
    """Configure ONNX Runtime.

    Attributes:
        providers: execution providers; each node runs on the first that supports it.
        threads: of each session on the CPU; 0 lets ONNX Runtime choose.
        share_threads: use one pool for all sessions of the process. Every other session of the
            process must then ask for it too: ONNX Runtime refuses those that do not.
        low_memory: share the pages of one weights file and one arena of activations among the
            sessions, which takes a fraction of the memory and is slower. Weights that other
            operators than products read are copied: ONNX Runtime moves transposes past such
            operators, and then transposes a weight under its name.
    """

    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    threads: int = 0
    share_threads: bool = False
    low_memory: bool = False


def import_onnxruntime() -> Any:
    """Import ONNX Runtime; the error without it says how to install it."""
    try:
        import onnxruntime  # type: ignore[import-untyped]  # it has no annotations
    except ImportError as error:
        raise ConfigError("ONNX Runtime is not installed", got=error, remedy=INSTALL) from error
    return onnxruntime


@cache
def _shared_pool(threads: int) -> None:
    import_onnxruntime().set_global_thread_pool_sizes(threads, 1)


@cache
def _shared_arena() -> None:
    runtime = import_onnxruntime()
    kinds = runtime.OrtAllocatorType, runtime.OrtMemType
    memory = runtime.OrtMemoryInfo("Cpu", kinds[0].ORT_ARENA_ALLOCATOR, 0, kinds[1].DEFAULT)
    runtime.create_and_register_allocator(memory, None)


def _session_options(options: SessionOptions) -> Any:
    made = import_onnxruntime().SessionOptions()
    if options.share_threads:
        _shared_pool(options.threads)
        made.use_per_session_threads = False
    else:
        made.intra_op_num_threads = options.threads
        # Idle threads that spin would take the cores from other sessions, and from torch.
        made.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if options.low_memory:
        _shared_arena()
        made.enable_mem_pattern = False
        made.add_session_config_entry("session.use_env_allocators", "1")
        made.add_session_config_entry("session.disable_prepacking", "1")
    return made


class OnnxGraph:
    """Hold a session, and run it on tensors in the order of ``inputs`` and ``outputs``."""

    def __init__(
        self,
        graph: GraphFile,
        inputs: Sequence[str],
        outputs: Sequence[str],
        options: SessionOptions,
    ) -> None:
        """Open the session; it reads no files.

        Raises:
            ConfigError: ONNX Runtime refuses the graph, or lacks a requested provider.
        """
        path = graph.path
        runtime = import_onnxruntime()
        missing = sorted({*options.providers} - {*runtime.get_available_providers()})
        if missing:
            raise _no_provider(str(path), missing, runtime.get_available_providers())
        made = _session_options(options)
        # Views of the weights file: whoever holds the session must hold them.
        self._weights = [
            runtime.OrtValue.ortvalue_from_numpy_with_onnx_type(weight.content, weight.kind)
            for weight in graph.weights
        ]
        try:
            if graph.weights:
                made.add_external_initializers([w.name for w in graph.weights], self._weights)
            if options.low_memory:  # else each session copies them
                for weight, value in zip(graph.weights, self._weights, strict=True):
                    if weight.only_multiplied:
                        made.add_initializer(weight.name, value)
            session = runtime.InferenceSession(
                graph.content, made, providers=list(options.providers)
            )
        except Exception as error:  # onnxruntime raises types that it does not export
            raise ConfigError(
                "ONNX Runtime refuses the graph",
                where=str(path),
                got=error,
                remedy="check the versions of onnxruntime and of the bundle (`ditfastattn verify`)",
            ) from error
        absent = sorted({*options.providers} - {*session.get_providers()})
        if absent:  # it falls back silently
            raise _no_provider(str(path), absent, session.get_providers())
        self.providers: tuple[str, ...] = tuple(session.get_providers())
        self._session, self._inputs, self._outputs = session, tuple(inputs), tuple(outputs)
        self._path = path
        self._device = torch.device("cuda" if options.providers[0] in _ON_CUDA else "cpu")

    @property
    def device(self) -> torch.device:
        """Return where the tensors must be."""
        return self._device

    def __call__(self, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Run from ``tensors`` into ``results``, which are contiguous.

        Raises:
            EngineError: ONNX Runtime failed.
        """
        binding = self._session.io_binding()
        kept = [tensor.contiguous() for tensor in tensors]
        try:
            for name, tensor in zip(self._inputs, kept, strict=True):
                binding.bind_input(name, *self._place(tensor))
            for name, tensor in zip(self._outputs, results, strict=True):
                binding.bind_output(name, *self._place(tensor))
            if self._device.type == "cuda":  # the session runs on a stream of its own
                torch.cuda.current_stream().synchronize()
            binding.synchronize_inputs()
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        except Exception as error:  # onnxruntime raises types that it does not export
            raise EngineError(f"{self._path}: ONNX Runtime failed: {error}") from error

    def _place(self, tensor: Tensor) -> tuple[Any, ...]:
        index = self._device.index or 0
        kind = ELEMENT_TYPES[tensor.dtype]
        return self._device.type, index, kind, tuple(tensor.shape), tensor.data_ptr()


def _no_provider(where: str, missing: Sequence[str], present: Sequence[str]) -> ConfigError:
    return ConfigError(
        "an execution provider did not load",
        where=where,
        got=", ".join(missing),
        expected=", ".join(present),
        remedy="install the onnxruntime package that has it (`pip install onnxruntime-gpu` for "
        "CUDA, without onnxruntime beside it), or choose another",
    )
