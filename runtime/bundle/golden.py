"""A bundle's golden sample: one generation, kept so that any runtime or port can check itself.

It is a file of safetensors: ``inputs/NAME`` for each condition, ``outputs/STEP/NAME`` for what the
model returns at each step and, where the manifest says what the sampler does between steps,
``noise``, which the generation begins with, and ``latents``, which it ends with. Elsewhere every
step has the latents ``inputs/NAME``. Where guidance takes two calls a step, the names of what the
second one takes and returns begin with ``second/``. At a step without guidance the model is given
the conditional part of the inputs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.runtime.bundle.files import open_bundle
from ditfastattn.runtime.bundle.manifest import EXPORT_AGAIN
from ditfastattn.runtime.bundle.specs import SECOND_CALL
from ditfastattn.runtime.bundle.stepping import Stepper, guided
from ditfastattn.runtime.bundle.transformer import BundleTransformer
from ditfastattn.runtime.bundle.unguided import conditional_inputs

GOLDEN_FILE: Final = "golden.safetensors"
INPUT: Final = "inputs/"
SECOND: Final = "second/"  # of a step's two calls
NOISE: Final = "noise"
LATENTS: Final = "latents"


def prefix_of(call: int) -> str:
    """Return what names begin with that belong to the call number ``call`` of a step."""
    return SECOND if call else ""


def input_name(name: str, call: int = 0) -> str:
    """Name what the model is given as ``name``."""
    return f"{prefix_of(call)}{INPUT}{name}"


def output_name(step: int, name: str, call: int = 0) -> str:
    """Name what the model returns as ``name`` at ``step``."""
    return f"{prefix_of(call)}outputs/{step}/{name}"


@dataclass(frozen=True)
class GoldenErrors:
    """Hold how far a bundle is from its golden sample.

    Attributes:
        steps: the largest absolute error of each call's outputs, on the sample's latents.
        latents: the largest error of a generation's last latents, relative to the largest one.
        loop: the same of the unrolled loop; both 0 where there are none.
    """

    steps: tuple[float, ...]
    latents: float
    loop: float


def compare_with_golden(folder: str | os.PathLike[str], model: BundleTransformer) -> GoldenErrors:
    """Run ``model``, which was loaded from ``folder``, and compare it with the golden sample.

    Raises:
        ConfigError: the bundle has none, or was replaced meanwhile.
    """
    opened = open_bundle(folder, model.manifest.format)
    manifest = opened.manifest
    if manifest != model.manifest.model_copy(update={"loop": manifest.loop}):
        raise ConfigError(
            "the bundle was replaced while it was in use", where=str(folder), remedy="run it again"
        )
    if not manifest.golden:
        raise ConfigError(
            "the bundle has no golden sample to compare with",
            where=str(opened.root),
            remedy=f"give the pipeline that it was exported from, or {EXPORT_AGAIN}",
        )
    return _Comparison(model, load_tensors(bytes(opened.content(manifest.golden)))).errors()


class _Comparison:
    def __init__(self, model: BundleTransformer, sample: Mapping[str, Tensor]) -> None:
        self.model, self.sample, self.manifest = model, sample, model.manifest
        prefixes = [input_name("", call) for call in range(len(self.manifest.calls))]
        self.given = [
            {
                name.removeprefix(prefix): item.to(model.device)
                for name, item in sample.items()
                if name.startswith(prefix)
            }
            for prefix in prefixes
        ]

    def errors(self) -> GoldenErrors:
        """Compare step by step, then a whole generation, then the loop."""
        found: list[float] = []

        def compare(step: int, call: int, results: list[Tensor]) -> Tensor:
            names = [output_name(step, spec.name, call) for spec in self.manifest.outputs]
            wanted = [self.sample[name].float() for name in names]
            pairs = zip(results, wanted, strict=True)
            found.append(max(float((a.float().cpu() - b).abs().max()) for a, b in pairs))
            return wanted[0]

        self._generate(compare)
        latents = self._generate(lambda _step, _call, results: results[0].float().cpu())
        loop = None
        if self.manifest.loop is not None and NOISE in self.sample:
            noise = self.sample[NOISE].to(self.model.device, self.model.dtype)
            first, *others = map(_nested, self.given)
            second = dict(zip([SECOND_CALL], others, strict=False))
            loop = self.model.generate(noise, **first, **second)
        return GoldenErrors(tuple(found), self._relative(latents), self._relative(loop))

    def _relative(self, latents: Tensor | None) -> float:
        if latents is None:
            return 0.0
        wanted = self.sample[LATENTS]
        return float((latents.float().cpu() - wanted).abs().max() / wanted.abs().max())

    def _generate(self, answer: Callable[[int, int, list[Tensor]], Tensor]) -> Tensor | None:
        """Step through a generation whose sampler gets ``answer`` of each call's results."""
        manifest, stepping = self.manifest, self.manifest.stepping
        stepper = None if stepping is None else Stepper(stepping, self.sample[NOISE])
        specs = {spec.name: spec for spec in manifest.inputs}
        self.model.reset()
        sampler = manifest.sampler
        for step, (timestep, layout) in enumerate(
            zip(sampler.timesteps, sampler.layouts, strict=True)
        ):
            outputs: list[Tensor] = []
            for call, conditions in enumerate(self._given_at(layout)):
                given = dict(conditions)
                if stepper is not None:
                    spec = specs[manifest.latent]
                    rows = torch.cat([stepper.model_input] * (2 if layout.batched else 1))
                    given[spec.name] = rows.to(spec.torch_dtype)
                if manifest.plan_sha256:
                    spec, like = specs[manifest.timestep], next(iter(given.values()))
                    count = len(given[manifest.latent] if manifest.latent else like)
                    at = torch.full(spec.sizes(count), timestep, dtype=spec.torch_dtype)
                    given[spec.name] = at
                outputs.append(answer(step, call, self._call(given)))
            if stepper is not None and stepping is not None:
                stepper.step(guided(torch.cat(outputs), stepping, layout))
        return None if stepper is None else stepper.latents[-1]

    def _given_at(self, layout: CfgLayout) -> Sequence[Mapping[str, Tensor]]:
        """Return what each call of a step with ``layout`` is given."""
        guided = self.manifest.sampler.cfg_layout
        if layout is guided:
            return self.given
        chosen = self.given[guided.conditional_call]
        return [conditional_inputs(chosen, self.manifest.inputs, guided)]

    def _call(self, given: Mapping[str, Tensor]) -> list[Tensor]:
        made = self.model(**_nested({name: t.to(self.model.device) for name, t in given.items()}))
        items = made if isinstance(made, tuple) else (made.sample,)
        return [item for item in items if isinstance(item, Tensor)]


def _nested(given: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return arguments by name: ``conditions.mask`` as an entry of the dict ``conditions``."""
    found: dict[str, Any] = {}
    for name, tensor in given.items():
        *path, last = name.split(".")
        place = found
        for part in path:
            place = place.setdefault(part, {})
        place[last] = tensor
    return found
