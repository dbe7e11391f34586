"""Load a bundle into one of its runtimes; neither is imported before it is used."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ditfastattn.core.errors import ConfigError

if TYPE_CHECKING:
    from ditfastattn.runtime.bundle.transformer import BundleTransformer


def load(
    folder: str | os.PathLike[str],
    providers: Sequence[str] = ("CPUExecutionProvider",),
    *,
    runtime: str = "onnx",
    threads: int = 0,
    share_threads: bool = False,
    low_memory: bool = False,
    target: str = "",
    cuda_graphs: bool = False,
) -> BundleTransformer:
    """Return a transformer that runs the bundle in ``folder``.

    Args:
        folder: the bundle.
        providers: execution providers, in order of preference; each must load.
        runtime: ``onnx`` (ONNX Runtime), ``openvino`` (on the CPU), ``tensorrt``, the engines that
            ``build`` has made, or ``aoti``: torch's AOTInductor, for bundles exported with
            ``format="pt2"``.
        threads: of each ONNX graph on the CPU; 0 lets ONNX Runtime choose.
        share_threads: use one pool of threads for all of ONNX Runtime's sessions in the process;
            all others must then use it too.
        low_memory: share the pages of the weights file and one arena of activations among all
            ONNX graphs: a fraction of the memory, but slower.
        target: of the TensorRT engines; by default those for this GPU.
        cuda_graphs: capture each TensorRT engine as a CUDA graph.

    Returns:
        A module to put in the place of the pipeline's transformer. It takes and returns what the
        exported model does, at any batch size unless that was fixed.

    Raises:
        ConfigError: the bundle is incomplete or not valid, or what was requested is missing.
    """
    if runtime == "tensorrt":
        from ditfastattn.runtime.tensorrt import load as loading_engines

        return loading_engines.load(folder, target=target, cuda_graphs=cuda_graphs)
    if runtime == "aoti":
        from ditfastattn.runtime.aoti import load as loading_packages

        return loading_packages.load(folder)
    if runtime not in ("onnx", "openvino"):
        raise ConfigError(
            "there is no such runtime", got=runtime, expected="onnx, openvino, tensorrt, aoti"
        )
    from ditfastattn.runtime.bundle import load as loading

    if runtime == "openvino":
        return loading.load_openvino(folder, threads=threads)
    return loading.load(
        folder, providers, threads=threads, share_threads=share_threads, low_memory=low_memory
    )
