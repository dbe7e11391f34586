"""Run the whole steps of a plan with plain torch, as docs/plan-format.md specifies them.

Where guidance calls the model twice a step, use one ``WholeSteps`` for each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, cat, zeros_like


class WholeSteps:
    """Decide at each step whether the model runs, and make its output of earlier ones if not."""

    def __init__(self, plan: dict[str, Any], call: int = 0) -> None:
        """Take a plan as ``json.load`` returns it; ``call`` is 1 for the second call of a step."""
        place = next(i for i, site in enumerate(plan["sites"]) if site["kind"] == "output")
        self.strategies = [row[place] for row in plan["strategies"]]
        self.coefficients = plan["sites"][place].get("coefficients")
        sampler = plan["sampler"]
        phases = sampler.get("phases") or [sampler]  # steps in a row, and their cfg_layout
        layouts = [phase["cfg_layout"] for phase in phases for _ in range(phase["steps"])]
        self.batched = [layout in ("cond-first", "uncond-first") for layout in layouts]
        self.begins = {sum(each["steps"] for each in phases[:i]) for i in range(len(phases))}
        self.call = call
        self.steps: list[int] = []  # that ran
        self.outputs: list[Tensor] = []  # of those

    def __call__(self, step: int, latent: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """Return the output at ``step``: what ``run`` returns, or a sum of earlier outputs."""
        strategy = self.strategies[step]
        if step in self.begins:
            self.steps, self.outputs = [], []
        if strategy == "full":
            self.steps, self.outputs = [step, *self.steps[:3]], [run(), *self.outputs[:3]]
            return self.outputs[0]
        if strategy.startswith("fitted"):
            return self.fitted(step, latent, self.outputs[: int(strategy[-1])])
        known = {"share-step": 1, "extrapolate": 2, "extrapolate-quadratic": 3}[strategy]
        total = 0.0 * self.outputs[0]
        for own, output in zip(self.steps[:known], self.outputs, strict=False):  # Lagrange
            weight = 1.0
            for other in self.steps[:known]:
                weight *= (step - other) / (own - other) if other != own else 1.0
            total = total + weight * output
        return total

    def fitted(self, step: int, latent: Tensor, outputs: list[Tensor]) -> Tensor:
        """Return a weighted sum of latent and outputs, in fp32, for each guidance branch."""
        rows = self.coefficients[step]
        x, halves = [shaped(latent, outputs[0]).float()], [[each.float()] for each in outputs]
        if self.batched[step]:
            x, halves = list(x[0].chunk(2)), [list(each[0].chunk(2)) for each in halves]
        else:
            rows = [rows[self.call]]
        made = []
        for branch, row in enumerate(rows):
            terms = [x[branch], *(half for both in halves for half in both)]
            made.append(sum(a * term for a, term in zip(row, terms, strict=True)))
        return cat(made).to(outputs[0].dtype)


def shaped(latent: Tensor, output: Tensor) -> Tensor:
    """Return ``latent`` with as many channels as ``output``: cut, or with zeros added."""
    axis = 2 if output.dim() == 3 else 1
    if latent.shape[axis] < output.shape[axis]:
        return cat([latent, zeros_like(latent)], axis)
    return latent.narrow(axis, 0, output.shape[axis])
