"""Compare a bundle with the torch model that it was exported from."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditfastattn.export.watched_phases import guided_calls
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.bundle.golden import compare_with_golden
from ditfastattn.runtime.bundle.manifest import PLAN_FILE, Manifest, read_manifest
from ditfastattn.runtime.bundle.specs import SECOND_CALL
from ditfastattn.runtime.bundle.transformer import BundleTransformer
from ditfastattn.runtime.load import load
from ditfastattn.runtime.lowering import Lowering, many_compilations
from ditfastattn.runtime.pipeline.denoiser import plain_module
from ditfastattn.runtime.pipeline.prompts import Prompt, as_images, generate, split_prompts
from ditfastattn.runtime.search.judge.metrics import image_psnr

# The largest error of a step's output, and the least PSNR of an image in dB, by dtype.
BOUNDS = {"float32": (1e-4, 50.0), "float16": (5e-2, 35.0), "bfloat16": (2e-1, 30.0)}
# The same if only caches have that dtype: values within 1e-7 may round in opposite directions.
CACHE_BOUNDS = {"float16": (5e-3, 50.0), "bfloat16": (4e-2, 40.0)}


@dataclass(frozen=True)
class Verification:
    """Hold how far a bundle is from its model.

    Attributes:
        step_errors: the largest absolute error of each call's output, on the same inputs.
        variant_errors: the largest step error of each variant.
        psnr: of the image of a whole generation, in dB; infinite where none is made.
        loop_error: the largest error of the unrolled loop's latents, relative to the largest
            latent; 0 without a loop.
        latents_error: the same of a generation's last latents, where a golden sample has them.
        bounds: the largest error and the least PSNR allowed.
    """

    step_errors: tuple[float, ...]
    variant_errors: dict[str, float]
    psnr: float
    loop_error: float
    bounds: tuple[float, float]
    latents_error: float = 0.0

    @property
    def passed(self) -> bool:
        """Return whether both bounds are met."""
        error, psnr = self.bounds
        alike = max(*self.step_errors, self.loop_error, self.latents_error) <= error
        return alike and self.psnr >= psnr


class _StandIn(nn.Module):
    """Run the bundle in the transformer's place, in the torch model's dtype and so on its noise.

    With ``reference``, return its output instead, and record how far the bundle's differs.
    """

    def __init__(
        self, bundle: BundleTransformer, dtype: torch.dtype, reference: Any | None = None
    ) -> None:
        super().__init__()
        self.reference, self.bundle = reference, bundle
        self.config, self.dtype, self.device = bundle.config, dtype, bundle.device
        self.cache_context = bundle.cache_context
        self.errors: list[float] = []
        self.last: deque[Mapping[str, Any]] = deque(maxlen=len(bundle.manifest.scheduled))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = self.bundle.bind(args, kwargs)
        self.last.append(given)
        got = [item.to(self.dtype) for item in _tensors(self.bundle(*args, **kwargs))]
        if self.reference is None:
            return self.bundle.answer(got, given)
        expected = self.reference(**given)
        pairs = zip(_tensors(expected), got, strict=True)
        self.errors.append(max(float((a.cpu() - b.cpu()).abs().max()) for a, b in pairs))
        return expected


def _tensors(result: Any) -> list[Tensor]:
    found = result if isinstance(result, (tuple, list)) else [result.sample]
    return [item for item in found if isinstance(item, Tensor)]


def verify(
    folder: str | os.PathLike[str],
    pipeline: Any = None,
    call: Mapping[str, Any] | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    seed: int = 0,
    runtime: str = "onnx",
    target: str = "",
    cuda_graphs: bool = False,
) -> Verification:
    """Generate with the torch model and the bundle in ``folder``; compare every step and the image.

    The torch model runs by the bundle's plan, uncompiled, in its own dtype and on the pipeline's
    device: only the runtime differs, and the bundle's dtype. That and the dtype of its caches set
    the bounds.

    Args:
        folder: the bundle.
        pipeline: the pipeline that it was exported from; None compares with the bundle's golden
            sample instead.
        call: what the pipeline is called with.
        providers: execution providers of ONNX Runtime.
        seed: seeds the noise.
        runtime: as for ``load``.
        target: of the engines; by default those for this GPU.
        cuda_graphs: capture each engine as a CUDA graph.

    Raises:
        ConfigError: the bundle does not load, or does not match the pipeline's model.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    bundle = load(root, providers, runtime=runtime, target=target, cuda_graphs=cuda_graphs)
    if pipeline is None:
        found = compare_with_golden(root, bundle)
        errors = _by_variant(manifest, found.steps)
        bounds = _bounds(manifest)
        return Verification(found.steps, errors, math.inf, found.loop, bounds, found.latents)
    images, pair, loop_error = _generate_both(
        pipeline, bundle, split_prompts(call or {}, seed)[0], _plan_of(root, manifest)
    )
    return _summary(manifest, pair.errors, loop_error, images)


def _plan_of(root: Path, manifest: Manifest) -> Plan | None:
    return Plan.load(root / PLAN_FILE) if manifest.plan_sha256 else None


def _generate_both(
    pipeline: Any, bundle: BundleTransformer, prompt: Prompt, plan: Plan | None
) -> tuple[tuple[Tensor, Tensor], _StandIn, float]:
    """Generate with both; return the images, what compared each step, and the loop's error."""
    original = pipeline.transformer
    plain = plain_module(original)
    reference: Any = plain
    if plan is not None:
        options: dict[str, Any] = {"plan": plan, "lowering": Lowering.EAGER}
        reference = torch.compile(plain, backend="ditfastattn", fullgraph=True, options=options)
    dtype = getattr(plain, "dtype", torch.float32)
    pair = _StandIn(bundle, dtype, reference)
    try:
        with many_compilations(), _latents_of(pipeline.scheduler) as latents:
            pipeline.transformer = pair
            expected = as_images(generate(pipeline, prompt))
        loop_error = _loop_error(bundle, pair.last, latents)
        with many_compilations():
            bundle.reset()
            pipeline.transformer = _StandIn(bundle, dtype)
            got = as_images(generate(pipeline, prompt))
    finally:
        pipeline.transformer = original
    return (expected, got), pair, loop_error


@contextmanager
def _latents_of(scheduler: Any) -> Generator[list[Tensor]]:
    """Collect the first latents that ``scheduler`` steps from, and all that it steps to."""
    found: list[Tensor] = []
    step = scheduler.step

    def noting(output: Any, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = step(output, timestep, sample, *args, **kwargs)
        found.extend([] if found else [sample])
        found.append(result[0])
        return result

    scheduler.step = noting
    try:
        yield found
    finally:
        del scheduler.step


def _loop_error(
    bundle: BundleTransformer, calls: Iterable[Mapping[str, Any]], latents: Sequence[Tensor]
) -> float:
    loop = bundle.manifest.loop
    if loop is None:
        return 0.0
    guided = guided_calls(list(calls), bundle.manifest.sampler)
    arguments, *others = (call.arguments for call in guided)
    given = {**arguments, **dict(zip([SECOND_CALL], others, strict=False))}
    names = {spec.name.partition(".")[0] for spec in loop.conditions}
    conditions = {name: given[name] for name in names}
    rows = len(arguments[bundle.manifest.latent])
    halves = 2 if bundle.manifest.sampler.cfg_layout.batched else 1
    images = rows // halves  # some pipelines step both halves
    noise, expected = (item[:images].float().cpu() for item in (latents[0], latents[-1]))
    got = bundle.generate((noise / loop.noise_scale).to(bundle.dtype), **conditions).float().cpu()
    return float((got - expected).abs().max() / expected.abs().max())


def _summary(
    manifest: Manifest,
    errors: Sequence[float],
    loop_error: float,
    images: tuple[Tensor, Tensor],
) -> Verification:
    psnr = float(image_psnr(*images).min())
    by_variant = _by_variant(manifest, errors)
    return Verification(tuple(errors), by_variant, psnr, loop_error, _bounds(manifest))


def _by_variant(manifest: Manifest, errors: Sequence[float]) -> dict[str, float]:
    found: dict[str, float] = {}
    scheduled = manifest.scheduled
    for step, error in enumerate(errors):
        file = manifest.variants[scheduled[step % len(scheduled)]].file
        found[file] = max(error, found.get(file, 0.0))
    return found


def _bounds(manifest: Manifest) -> tuple[float, float]:
    """Return the largest error and the least PSNR that the dtypes of model and caches allow."""
    allowed = [BOUNDS[manifest.model.dtype]]
    kept = {slot.dtype for slot in manifest.every_slot if slot.dtype != manifest.model.dtype}
    allowed += [CACHE_BOUNDS[dtype] for dtype in kept & CACHE_BOUNDS.keys()]
    return max(error for error, _ in allowed), min(psnr for _, psnr in allowed)
