"""Offer export without importing onnx before it is used."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    on_progress: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> Manifest:
    """Write the transformer of ``pipeline``, run by ``plan``, as a bundle of ONNX graphs.

    Args:
        pipeline: a diffusers pipeline, or one like it.
        call: what it is called with; its resolution and text length are the bundle's.
        plan: the plan, or its path; None exports the dense model.
        out: the bundle's folder. An existing bundle is replaced once the new one is complete.
        dtype: of weights and activations, as torch names it; "" keeps the model's.
        dynamic_batch: whether the bundle takes any batch.
        loop: whether the whole generation is written as one graph too, scheduler and guidance
            inside.
        timestep: the name of the model's timestep argument.
        on_progress: called with the file just written, how many are done, and of how many.

    Raises:
        ConfigError: the plan does not match the model or sampler; an operator has no ONNX form;
            what is at ``out`` is not a bundle.
    """
    from ditfastattn.export import bundle

    options = bundle.ExportOptions(dtype, dynamic_batch, loop, timestep, on_progress)
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
    """Build TensorRT engines from the bundle in ``folder``, into its folder ``engines/<target>``.

    Args:
        folder: the bundle.
        target: a compute capability such as ``sm89``, for which TensorRT-RTX needs no GPU, or
            ``current``, this machine's GPU.
        layout: ``variants`` (an engine per distinct step), ``switch`` (one that holds all),
            ``loop`` (one for the whole generation) or ``auto``.
        images: the least, usual and most images of a call.
        max_engine_mb: the MiB that the engines of all variants may take, each with weights of its
            own, before ``auto`` takes the switch.
        time_limit: of each build, in seconds; each runs in its own process.
        library: ``tensorrt`` or ``tensorrt_rtx``; "" takes what suits this machine.
        on_progress: called with the graph, its builder's phase, and how much is done (0 to 1).

    Raises:
        ConfigError: the bundle is incomplete; TensorRT is absent, or cannot build for the target.
        EngineError: a build failed; engines built before are kept.
    """
    from ditfastattn.export.tensorrt import build as building
    from ditfastattn.runtime.tensorrt.engines import layout_named

    options = building.BuildOptions(
        target, layout_named(layout), images, max_engine_mb, time_limit, library, on_progress
    )
    return building.build(folder, options)


def verify(
    folder: str | os.PathLike[str],
    pipeline: Any,
    call: Mapping[str, Any],
    providers: Sequence[str] = ("CPUExecutionProvider",),
    seed: int = 0,
    *,
    runtime: str = "onnx",
    target: str = "",
    cuda_graphs: bool = False,
) -> Verification:
    """Compare the bundle in ``folder`` with the torch model of ``pipeline``.

    ``runtime``, ``target`` and ``cuda_graphs`` are ``load``'s.
    """
    from ditfastattn.export import verify as verifying

    return verifying.verify(folder, pipeline, call, providers, seed, runtime, target, cuda_graphs)
