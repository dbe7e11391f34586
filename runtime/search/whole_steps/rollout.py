"""Continue observed generations from outside, from any step, with any output of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ditfastattn.runtime.pipeline.model_call import output_of
from ditfastattn.runtime.search.whole_steps.observe import branches
from ditfastattn.runtime.search.whole_steps.observed import ModelCall, Observed

HISTORY = 4  # outputs that a fitted step may read


@dataclass(frozen=True)
class State:
    """Hold one generation between two steps.

    Attributes:
        latent: the sampler's.
        scheduler: before the step.
        outputs: of the last steps of this phase that ran, the last one first; guidance branches in
            their order.
        ran: the steps of this phase that ran, the last one first.
        returned: what the model has returned so far, call by call.
    """

    latent: Tensor
    scheduler: Any
    outputs: tuple[tuple[Tensor, ...], ...] = ()
    ran: tuple[int, ...] = ()
    returned: tuple[Tensor, ...] = ()


class Rollout:
    """Continue one observed generation."""

    def __init__(self, model: Callable[..., Any], observed: Observed) -> None:
        """Take the model, called with arguments by name, and its dense generation."""
        self._model, self.observed = model, observed

    @property
    def begin(self) -> State:
        """Return the state before the first step."""
        first = self.observed.steps[0].sampler
        return State(first.latent, self.observed.scheduler)

    def run(self, state: State, step: int) -> State:
        """Return the state in which the model has run at ``step``, before the sampler steps."""
        here = self.observed.steps[step]
        made = [self._call(call, state.latent * here.scale) for call in here.calls]
        found = tuple(branches(made, self.observed.layouts[step], state.latent))
        if step in self.observed.begins:
            state = replace(state, outputs=(), ran=())
        return replace(
            state,
            outputs=(found, *state.outputs)[:HISTORY],
            ran=(step, *state.ran),
            returned=(*state.returned, *made),
        )

    def _call(self, call: ModelCall, latent: Tensor) -> Tensor:
        name = self.observed.latent
        given = call.arguments[name]
        changed = given.clone()
        for half in changed.split(len(latent)):
            half[:, : latent.shape[1]] = latent.to(given.dtype)
        with torch.no_grad():
            return output_of(self._model(**{**call.arguments, name: changed})).clone()

    def guided(self, outputs: Sequence[Tensor], step: int) -> Tensor:
        """Return what guidance makes of the branches' ``outputs``."""
        return self.observed.steps[step].guidance(outputs)

    def latent_input(self, state: State, step: int) -> Tensor:
        """Return the latent as the model would be given it, ``[B, C, ...]``."""
        return state.latent.float() * self.observed.steps[step].scale

    def advance(self, state: State, step: int, output: Tensor) -> State:
        """Let the sampler step, the guided model's output being ``output``."""
        scheduler = copy.deepcopy(state.scheduler)
        latent = self._step(scheduler, state, step, output)
        return replace(state, latent=latent, scheduler=scheduler)

    def peek(self, state: State, step: int, output: Tensor) -> Tensor:
        """Return the next latent, the guided model's output being ``output``."""
        return self._step(copy.deepcopy(state.scheduler), state, step, output)

    def _step(self, scheduler: Any, state: State, step: int, output: Tensor) -> Tensor:
        here = self.observed.steps[step]
        sampler = here.sampler
        given = (sum(here.guidance.weights) * output).to(sampler.output.dtype)
        keywords = {**sampler.keywords, "return_dict": False}
        if sampler.noise_state is not None:
            noise = torch.Generator(keywords["generator"].device)
            noise.set_state(sampler.noise_state)
            keywords["generator"] = noise
        latent = state.latent
        if self.observed.doubled:
            given, latent = torch.cat([given, given]), torch.cat([latent, latent])
        made: Tensor = scheduler.step(given, sampler.timestep, latent, **keywords)[0]
        return made.chunk(2)[0] if self.observed.doubled else made
