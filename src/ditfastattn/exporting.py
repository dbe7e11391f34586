"""Offer export and its runtimes without importing onnx before they are used."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditfastattn.export.verify import Verification
    from ditfastattn.passes.plan import Plan
    from ditfastattn.runtime.bundle.manifest import Manifest
    from ditfastattn.runtime.bundle.transformer import BundleTransformer


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
        out: the bundle's folder. A bundle that is there is replaced once the new one is whole.
        dtype: of weights and activations, as torch names it; "" keeps the model's.
        dynamic_batch: whether the bundle takes any batch.
        loop: whether the whole generation is written as one graph too, scheduler and guidance
            inside.
        timestep: the name of the model's timestep argument.
        on_progress: is told which file was written, and how many of how many.

    Raises:
        ConfigError: the plan is for another model or sampler; an operator has no ONNX form; there
            is something else at ``out``.
    """
    from ditfastattn.export import bundle

    options = bundle.ExportOptions(dtype, dynamic_batch, loop, timestep, on_progress)
    return bundle.export(pipeline, call, plan, out, options)


def load(
    folder: str | os.PathLike[str],
    providers: Sequence[str] = ("CPUExecutionProvider",),
    *,
    threads: int = 0,
    share_threads: bool = False,
    low_memory: bool = False,
) -> BundleTransformer:
    """Return a transformer that runs the bundle in ``folder``; see ``runtime.bundle.load``."""
    from ditfastattn.runtime.bundle import load as loading

    return loading.load(
        folder, providers, threads=threads, share_threads=share_threads, low_memory=low_memory
    )


def verify(
    folder: str | os.PathLike[str],
    pipeline: Any,
    call: Mapping[str, Any],
    providers: Sequence[str] = ("CPUExecutionProvider",),
    seed: int = 0,
) -> Verification:
    """Compare the bundle in ``folder`` with the torch model of ``pipeline``; see its result."""
    from ditfastattn.export import verify as verifying

    return verifying.verify(folder, pipeline, call, providers, seed)
