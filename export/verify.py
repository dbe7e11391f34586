"""Compare a bundle with the torch model that it was exported from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditfastattn.errors import ConfigError
from ditfastattn.export.bundle import PLAN_FILE
from ditfastattn.passes.plan import Plan
from ditfastattn.runtime.bundle.load import load
from ditfastattn.runtime.bundle.manifest import read_manifest
from ditfastattn.runtime.bundle.transformer import BundleTransformer
from ditfastattn.runtime.lowering import Lowering, many_compilations
from ditfastattn.runtime.search.metrics import image_psnr
from ditfastattn.runtime.search.prompts import as_images, generate, split_prompts

# The largest error of a step's output, and the least PSNR of an image in dB, by dtype.
BOUNDS = {"float32": (1e-4, 50.0), "float16": (5e-2, 35.0), "bfloat16": (2e-1, 30.0)}


@dataclass(frozen=True)
class Verification:
    """Hold how far a bundle is from its model.

    Attributes:
        step_errors: the largest absolute error of each step's output, on the same inputs.
        variant_errors: the largest of those of each variant.
        psnr: of a whole generation's image, in dB.
        bounds: what is allowed: the error and the PSNR.
    """

    step_errors: tuple[float, ...]
    variant_errors: dict[str, float]
    psnr: float
    bounds: tuple[float, float]

    @property
    def passed(self) -> bool:
        """Tell whether both bounds are met."""
        error, psnr = self.bounds
        return max(self.step_errors) <= error and self.psnr >= psnr


class _Pair(nn.Module):
    """Answer as the torch model does; put the same question to the bundle and compare."""

    def __init__(self, reference: Any, bundle: BundleTransformer) -> None:
        super().__init__()
        self.reference, self.bundle = reference, bundle
        self.config, self.dtype, self.device = bundle.config, bundle.dtype, bundle.device
        self.errors: list[float] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        expected = self.reference(*args, **kwargs)
        got = self.bundle(*args, **kwargs)
        pairs = zip(_tensors(expected), _tensors(got), strict=True)
        self.errors.append(max(float((a.cpu() - b.cpu()).abs().max()) for a, b in pairs))
        return expected


def _tensors(result: Any) -> list[Tensor]:
    found = result if isinstance(result, (tuple, list)) else [result.sample]
    return [item for item in found if isinstance(item, Tensor)]


def verify(
    folder: str | os.PathLike[str],
    pipeline: Any,
    call: Mapping[str, Any],
    providers: Sequence[str] = ("CPUExecutionProvider",),
    seed: int = 0,
) -> Verification:
    """Generate with the torch model and the bundle in ``folder``; compare every step and the image.

    The torch model runs by the bundle's plan, uncompiled: nothing but the runtime differs.

    Raises:
        ConfigError: the bundle does not load, or it is of another model than the pipeline's.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    bundle = load(root, providers)
    prompt = split_prompts(call, seed)[0]
    original = pipeline.transformer
    plain = getattr(original, "_orig_mod", original)
    reference: Any = plain
    if manifest.plan_sha256:
        options: dict[str, Any] = {"plan": Plan.load(root / PLAN_FILE), "lowering": Lowering.EAGER}
        reference = torch.compile(plain, backend="ditfastattn", fullgraph=True, options=options)
    dtype = str(getattr(plain, "dtype", torch.float32)).removeprefix("torch.")
    if dtype != manifest.model.dtype:
        raise ConfigError(
            "the bundle is of another dtype than the pipeline's model",
            where=str(root),
            got=manifest.model.dtype,
            expected=dtype,
            remedy="load the pipeline in the bundle's dtype to verify it",
        )
    pair = _Pair(reference, bundle)
    try:
        with many_compilations():
            pipeline.transformer = pair
            expected = as_images(generate(pipeline, prompt))
            bundle.reset()
            pipeline.transformer = bundle
            got = as_images(generate(pipeline, prompt))
    finally:
        pipeline.transformer = original
    return _summary(manifest.variants, manifest.schedule, pair.errors, expected, got, dtype)


def _summary(
    variants: Sequence[Any],
    schedule: Sequence[int],
    errors: Sequence[float],
    expected: Tensor,
    got: Tensor,
    dtype: str,
) -> Verification:
    by_variant: dict[str, float] = {}
    for step, error in enumerate(errors):
        file = variants[schedule[step % len(schedule)]].file
        by_variant[file] = max(error, by_variant.get(file, 0.0))
    psnr = float(image_psnr(expected, got).min())
    return Verification(tuple(errors), by_variant, psnr, BOUNDS[dtype])
