"""Sketch every site at every step of a dense generation: a sample of its outputs and residuals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.search.measure.graph_runner import Environment
from ditfastattn.runtime.search.measure.session import Outputs, Session
from ditfastattn.runtime.search.measure.site_evaluator import SiteEvaluator

_SAMPLES = 2048  # elements per site, step and guidance branch
_SEED = 0


@dataclass(frozen=True)
class Sketch:
    """Hold sampled elements of outputs ``[T, M, L, samples]``, and of residuals.

    ``L`` counts guidance branches, the conditional one first; it is 1 without guidance. Residuals
    are of each form of window, ``[T, M, F, L, samples]``, and zero where a site lacks it.
    """

    outputs: Tensor
    residuals: Tensor


class Profiler:
    """Run a generation dense and sketch each site at each step.

    At the steps ``probes`` it also measures how sharing each site's last output would change the
    model's output: ``effects[step][site]``, the mean square of the guided difference.
    """

    def __init__(self, session: Session, probes: Sequence[int] = ()) -> None:
        """Take the session."""
        self._session = session
        self._probes = probes
        self._branches = [
            _Branch(SiteEvaluator(session.captured, session.sites, session.layout))
            for _ in range(session.layout.calls)
        ]
        self._sites = session.sites
        self._layout = session.layout
        self.results: list[Tensor] = []
        self.effects: dict[int, list[float]] = {}

    def step(self, args: Sequence[Tensor]) -> Outputs:
        """Run one call of a step."""
        at, number = divmod(len(self.results), len(self._branches))
        branch = self._branches[number]
        evaluator = branch.evaluator
        environment = evaluator.begin(args)
        outputs, residuals = [], []
        trials: list[Tensor] = []
        for index in range(len(self._sites)):
            evaluator.advance(environment, index)
            output = evaluator.attend(environment, index, Strategy.FULL)
            outputs.append(_sample(output, self._layout))
            found = self._residuals(evaluator, environment, index, output)
            missing = window_forms(self._sites) - len(found)
            residuals.append(torch.stack([*found, *[torch.zeros_like(outputs[-1])] * missing]))
            if at in self._probes:
                shared = evaluator.memory[index].output
                assert shared is not None  # step 0 is never a probe
                trials.append(evaluator.trial(environment, index, shared)[0])
            evaluator.memory[index].output = output
            evaluator.put(environment, index, output)
        branch.outputs.append(torch.stack(outputs))
        branch.residuals.append(torch.stack(residuals))
        results = evaluator.finish(environment, len(self._sites) - 1)
        self.results.append(results[0].clone())
        branch.differences = [trial - results[0] for trial in trials]
        if trials and branch is self._branches[-1]:
            halves = zip(*(each.differences for each in self._branches), strict=True)
            self.effects[at] = [self._effect(torch.cat(parts)) for parts in halves]
        return results

    def _residuals(
        self, evaluator: SiteEvaluator, environment: Environment, index: int, output: Tensor
    ) -> list[Tensor]:
        """Return samples of the residual of each form of window, ``[L, samples]`` each."""
        return [
            _sample(evaluator.residual(environment, index, output, form), self._layout)
            for form in self._sites[index].windows
        ]

    def _effect(self, difference: Tensor) -> float:
        return _guided_energy(difference, self._layout, self._session.guidance_scale)

    def sketch(self) -> Sketch:
        """Return the sketch of the generation."""
        outputs = [torch.stack(branch.outputs) for branch in self._branches]
        residuals = [torch.stack(branch.residuals) for branch in self._branches]
        return Sketch(torch.cat(outputs, dim=2), torch.cat(residuals, dim=3))


def window_forms(sites: Sequence[Site]) -> int:
    """Return how many forms of window a site has at most; at least 1."""
    return max(1, *(len(site.windows) for site in sites))


@dataclass
class _Branch:
    """Hold what the profiler keeps of one call per step: of a guidance branch, or of both."""

    evaluator: SiteEvaluator
    outputs: list[Tensor] = field(default_factory=list)
    residuals: list[Tensor] = field(default_factory=list)
    differences: list[Tensor] = field(default_factory=list)


def _guided_energy(difference: Tensor, layout: CfgLayout, guidance_scale: float | None) -> float:
    """Return the mean square of a difference of model outputs, as guidance weighs its halves."""
    if layout is CfgLayout.NONE or guidance_scale is None:
        return float(difference.float().square().mean())
    first, second = difference.float().chunk(2)
    swapped = layout in (CfgLayout.UNCOND_FIRST, CfgLayout.SEPARATE_UNCOND_FIRST)
    conditional, unconditional = (second, first) if swapped else (first, second)
    guided = unconditional + guidance_scale * (conditional - unconditional)
    return float(guided.square().mean())


def _sample(tensor: Tensor, layout: CfgLayout) -> Tensor:
    """Return the same random elements of each guidance branch of ``[B, H, N, D]``, fp32."""
    branches = 2 if layout.batched else 1
    flat = tensor.reshape(branches, -1)
    size = flat.shape[1]
    if size > _SAMPLES:
        generator = torch.Generator().manual_seed(_SEED)
        chosen = torch.randint(size, (_SAMPLES,), generator=generator)
    else:  # all of them, repeated: every site has as many samples
        chosen = torch.arange(_SAMPLES) % size
    sample = flat[:, chosen.to(tensor.device)].float().cpu()
    return sample.flip(0) if layout is CfgLayout.UNCOND_FIRST else sample
