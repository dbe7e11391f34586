"""Run one ONNX graph of a bundle on torch tensors, without copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditfastattn.core.errors import ConfigError, EngineError
from ditfastattn.runtime.bundle.specs import TensorSpec

_INSTALL = 'pip install "ditfastattn[onnx]"'
_ON_CUDA = (
    "CUDAExecutionProvider",
    "TensorrtExecutionProvider",
    "NvTensorRTRTXExecutionProvider",
)
_ELEMENT_TYPES = {  # of onnx.TensorProto
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int16: 5,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}


@dataclass(frozen=True)
class SessionOptions:
    """Configure ONNX Runtime.

    Attributes:
        providers: execution providers; each node runs on the first that supports it.
        threads: of each session on the CPU; 0 lets ONNX Runtime choose.
        share_threads: use one pool for all sessions of the process. Every other session of the
            process must then ask for it too: ONNX Runtime refuses those that do not.
        low_memory: share the pages of one weights file and one arena of activations among the
            sessions, which takes a fraction of the memory and is slower.
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
        raise ConfigError("ONNX Runtime is not installed", got=error, remedy=_INSTALL) from error
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


def check_graph(
    path: Path, weights: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> None:
    """Raise ``ConfigError`` unless the graph matches the manifest.

    It must refer to no file but ``weights`` beside it, and have these ``inputs`` and ``outputs``.
    """
    model = _read(path)
    _check_location(path, model, weights)
    for kind, values, specs in (
        ("inputs", model.graph.input, inputs),
        ("outputs", model.graph.output, outputs),
    ):
        found = {value.name: _described(value) for value in values}
        wanted = {spec.name: (_ELEMENT_TYPES[spec.torch_dtype], spec.dims) for spec in specs}
        if found != wanted:
            name = min(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))
            raise ConfigError(
                f"the {kind} of the graph differ from the manifest",
                where=f"{path}: {name}",
                got=found.get(name, "none of that name"),
                expected=wanted.get(name, "none of that name"),
                remedy="export the bundle again (`ditfastattn export`)",
            )


def _described(value: Any) -> tuple[int, tuple[int | str, ...]]:
    """Return the element type and the dimensions of a graph's input or output."""
    tensor = value.type.tensor_type
    dims = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return tensor.elem_type, dims


def _read(path: Path) -> Any:
    try:
        import onnx
    except ImportError as error:
        raise ConfigError("onnx is not installed", got=error, remedy=_INSTALL) from error
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # no stubs

    try:
        return onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise ConfigError("the graph is not ONNX", where=str(path), got=error) from error


def _check_location(path: Path, model: Any, weights: str) -> None:
    for tensor in _tensors(model.graph):
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value != weights:
                raise ConfigError(
                    "the graph refers to a file that is not the bundle's weights",
                    where=f"{path}: {tensor.name}",
                    got=entry.value,
                    expected=weights,
                    remedy="do not load bundles of unknown origin; export it again",
                )


def _tensors(graph: Any) -> list[Any]:
    """Return every tensor that a graph holds, those of its nodes and inner graphs included."""
    found = list(graph.initializer)
    for sparse in graph.sparse_initializer:
        found += [sparse.values, sparse.indices]
    for node in graph.node:
        for attribute in node.attribute:
            found += [attribute.t, *attribute.tensors]
            for inner in [attribute.g, *attribute.graphs]:
                found += _tensors(inner)
    return found


class OnnxGraph:
    """Hold a session, and run it on tensors in the order of ``inputs`` and ``outputs``."""

    def __init__(
        self, path: Path, inputs: Sequence[str], outputs: Sequence[str], options: SessionOptions
    ) -> None:
        """Open the session.

        Raises:
            ConfigError: ONNX Runtime refuses the graph, or lacks a requested provider.
        """
        runtime = import_onnxruntime()
        missing = sorted({*options.providers} - {*runtime.get_available_providers()})
        if missing:
            raise _no_provider(str(path), missing, runtime.get_available_providers())
        made = _session_options(options)
        try:
            session = runtime.InferenceSession(str(path), made, providers=list(options.providers))
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
        kind = _ELEMENT_TYPES[tensor.dtype]
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
