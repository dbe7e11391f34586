"""The public API of export. Imports onnx only when a function is called."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ditfastattn.core.choices import choice_named

if TYPE_CHECKING:
    from pathlib import Path

    from ditfastattn.export.verify import Verification
    from ditfastattn.passes.plan.schema import Plan
    from ditfastattn.runtime.bundle.manifest import Manifest
    from ditfastattn.runtime.tensorrt.engines import Engines


def export(
    pipeline: Any,
    call: Mapping[str, Any],
    plan: Plan | str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    *,
    dtype: str = "",
    dynamic_batch: bool = True,
    loop: bool = False,
    timestep: str = "timestep",
    format: str = "onnx",
    isa: str = "",
    regions: bool = False,
    golden: bool = True,
    on_progress: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> Manifest:
    """Write the transformer of ``pipeline``, run by ``plan``, as a bundle.

    Args:
        pipeline: a diffusers pipeline, or an object with the same interface.
        call: the arguments of a generation; they fix the bundle's resolution and text length.
        plan: the plan, or its path; None exports the dense model.
        out: the bundle's folder. An existing bundle is replaced once the new one is complete.
        dtype: torch's name of the dtype of weights and activations; "" keeps the model's.
        dynamic_batch: whether the bundle accepts any batch size.
        loop: whether to also write the whole generation as one graph, with scheduler and guidance.
        timestep: the name of the model's timestep argument.
        format: ``onnx``, or ``pt2``: AOTInductor packages, compiled here, for torch's runtime.
        isa: the vector instructions that packages use, ``avx2`` or ``avx512``; "" takes the best
            that this processor has.
        regions: whether packages are parts of blocks, each compiled once for all equal blocks and
            steps, instead of whole steps: so compiling does not take longer with more layers.
        golden: whether to add a golden sample, by which a bundle or a port of it checks itself;
            torch generates once for it, step by step as the plan says.
        on_progress: called with the file that was written, the number of files written so far, and
            the number of all files.

    Returns:
        The bundle's manifest.

    Raises:
        ConfigError: the plan does not match the model or the sampler; an operator has no ONNX
            form; ``out`` exists and is not a bundle.
    """
    from ditfastattn.export import bundle
    from ditfastattn.runtime.bundle.manifest import Format

    written_as = choice_named(Format, format, "export(format)")
    options = bundle.ExportOptions(
        dtype, dynamic_batch, loop, timestep, written_as, isa, regions, golden, on_progress
    )
    return bundle.export(pipeline, call, plan, out, options)


def build(
    folder: str | os.PathLike[str],
    *,
    target: str = "current",
    layout: str = "auto",
    images: tuple[int, int, int] = (1, 1, 4),
    max_engine_mb: float = 2048.0,
    time_limit: float = 3600.0,
    library: str = "",
    on_progress: Callable[[str, str, float], None] = lambda graph, phase, done: None,
) -> Engines:
    """Build TensorRT engines from the bundle in ``folder``, in its subfolder ``engines/<target>``.

    Args:
        folder: the bundle.
        target: a compute capability such as ``sm89``, for which TensorRT-RTX needs no GPU, or
            ``current``, this machine's GPU.
        layout: ``variants`` (an engine per distinct step), ``switch`` (one engine with all of
            them), ``loop`` (one for the whole generation) or ``auto``.
        images: the least, usual and most images of a call.
        max_engine_mb: the size in MiB of the engines of all variants, each with its own weights,
            above which ``auto`` chooses ``switch``.
        time_limit: the seconds that each build may take; each runs in its own process.
        library: ``tensorrt`` or ``tensorrt_rtx``; "" chooses the one that suits this machine.
        on_progress: called with the graph, the builder's current phase, and the fraction done.

    Returns:
        What was built, as ``engines.json`` records it.

    Raises:
        ConfigError: the bundle is incomplete; TensorRT is not installed, or cannot build for the
            target.
        EngineError: a build failed; engines that were built before it are kept.
    """
    from ditfastattn.export.tensorrt import build as building
    from ditfastattn.runtime.tensorrt.engines import Layout

    options = building.BuildOptions(
        target,
        choice_named(Layout, layout, "build(layout)"),
        images,
        max_engine_mb,
        time_limit,
        library,
        on_progress,
    )
    return building.build(folder, options)


def verify(
    folder: str | os.PathLike[str],
    pipeline: Any = None,
    call: Mapping[str, Any] | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    seed: int = 0,
    *,
    runtime: str = "onnx",
    target: str = "",
    cuda_graphs: bool = False,
) -> Verification:
    """Compare the bundle in ``folder`` with the torch model of ``pipeline``.

    The torch model runs by the bundle's plan, uncompiled: only the runtime differs, and the
    bundle's dtype.

    Args:
        folder: the bundle.
        pipeline: the pipeline that it was exported from; None compares the bundle with its golden
            sample instead, and needs no torch model.
        call: what the pipeline is called with.
        providers: execution providers of ONNX Runtime, in order of preference.
        seed: seeds the noise.
        runtime: ``onnx``, ``openvino``, ``tensorrt`` or ``aoti``, as for ``load``.
        target: of the TensorRT engines; by default those for this GPU.
        cuda_graphs: capture each TensorRT engine as a CUDA graph.

    Returns:
        The error of every step and of the image, and whether all are within their bounds.

    Raises:
        ConfigError: the bundle does not load, or does not match the pipeline's model.
        EngineError: the runtime failed.
    """
    from ditfastattn.export import verify as verifying

    return verifying.verify(folder, pipeline, call, providers, seed, runtime, target, cuda_graphs)


def export_triton(
    folder: str | os.PathLike[str],
    repository: str | os.PathLike[str],
    *,
    name: str = "",
    backend: str = "onnxruntime",
    images: int = 4,
) -> Path:
    """Write the bundle in ``folder``, which has a loop, as a model of a Triton repository.

    Args:
        folder: the bundle.
        repository: the folder that Triton serves. A model of that name gets a new version.
        name: of the model; "" takes that of the bundle's folder.
        backend: ``onnxruntime``, or ``python`` for servers that lack it: Triton's Python backend,
            with the onnxruntime package.
        images: the most that are generated together, of all requests that wait.

    Returns:
        The folder of the version.

    Raises:
        ConfigError: the bundle has no loop; the model in the repository takes other inputs;
            ``tritonclient`` is not installed.
    """
    from ditfastattn.export.triton.options import Backend, TritonOptions
    from ditfastattn.export.triton.repository import write_repository

    chosen = choice_named(Backend, backend, "export_triton(backend)")
    return write_repository(folder, repository, TritonOptions(name, chosen, images))


def update_weights(
    folder: str | os.PathLike[str],
    pipeline: Any,
    call: Mapping[str, Any],
    *,
    revalidate: bool = False,
    on_progress: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> Manifest:
    """Give the bundle in ``folder`` the weights of ``pipeline``'s transformer, and keep its plan.

    Programs that have loaded the bundle keep the old weights; others get it whole, old or new.

    Args:
        folder: the bundle.
        pipeline: a diffusers pipeline with the new weights, of the bundle's structure.
        call: the arguments of a generation, as for ``export``.
        revalidate: whether to measure first that the plan still meets its target.
        on_progress: called with the file that was written, the number of files written so far, and
            the number of all files.

    Returns:
        The bundle's new manifest.

    Raises:
        ConfigError: structure, shapes or sampler are not the bundle's, which stays as it was.
        TargetMissedError: the plan misses its target with these weights.
    """
    from ditfastattn.export import update_weights as updating

    return updating.update_weights(
        folder, pipeline, call, revalidate=revalidate, on_progress=on_progress
    )
