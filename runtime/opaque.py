"""Run whole steps of a model whose inside is not captured: it is called as it is, or not at all.

At the steps that run, the model does what it would do without a plan: compiled or not, quantized,
offloaded, sharded over processes. At the others its output is made of earlier ones, as the plan's
strategy for the whole output says, and the model is not called. What is decided depends on the
clock alone, so all processes of a sharded model decide alike.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.analysis.fingerprint import (
    OPAQUE,
    Fingerprint,
    is_offloaded,
    module_fingerprint,
    module_structure,
    weights_of,
)
from ditfastattn.passes.analysis.output_site import sizes
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.slot_schedule import gaps_before
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.call_order import FIRST, Call
from ditfastattn.runtime.calls import Calls, InterleavedError
from ditfastattn.runtime.clock import read_timestep
from ditfastattn.runtime.current_generation import PerGeneration, shown
from ditfastattn.runtime.matching import (
    check_fingerprint,
    mismatch,
    warn_of_unsampled_change,
)
from ditfastattn.runtime.options import WeightsCheck
from ditfastattn.runtime.pipeline.forwards import Forward
from ditfastattn.runtime.pipeline.model_call import bound_arguments, output_of, with_output
from ditfastattn.runtime.seen_weights import SeenWeights
from ditfastattn.runtime.trace import Shown

log = logging.getLogger(__name__)


def is_opaque(plan: Plan | None) -> bool:
    """Return whether ``plan`` is for a model whose inside is not captured."""
    return plan is not None and plan.model.structure.startswith(OPAQUE)


@dataclass
class _Branch:
    """Hold what one guidance branch has computed: outputs and their steps, the last one first."""

    outputs: list[Tensor] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    form: Any = None  # what the model returned last


@dataclass
class _Generation:
    calls: Calls
    branches: dict[tuple[int, int], _Branch] = field(default_factory=dict)

    def branch(self, call: Call) -> _Branch:
        """Return that of ``call``; those of earlier phases are forgotten."""
        if call.place not in self.branches:
            kept = {at: each for at, each in self.branches.items() if at[0] == call.phase}
            self.branches = {**kept, call.place: _Branch()}
        return self.branches[call.place]


class OpaqueModel:
    """Call one module at the steps that its plan runs, and make its outputs at the others."""

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        timestep: str = "timestep",
        check: WeightsCheck = WeightsCheck.SAMPLED,
    ) -> None:
        """Match ``plan`` with the module; ``check`` its weights as each generation begins.

        Raises:
            ConfigError: the plan is for another model.
        """
        (self._site,) = plan.sites
        self._plan, self._timestep = plan, timestep
        self._module, self._weights_check = weakref.ref(module), check
        self._sampled = self._matched(module)
        self._weights = self._seen()
        self._module_type = type(module)
        self._column = [row[0] for row in plan.strategies]
        self._most = max((strategy.outputs_read for strategy in self._column), default=0)
        self._generations = PerGeneration(self._begin)
        ran = sum(strategy.computes for strategy in self._column)
        log.info("opaque model: %d of %d steps run; it is called as it is", ran, len(self._column))

    def around(self, forward: Forward) -> Forward:
        """Return ``forward``, which is called at the steps that run only."""
        return lambda *args, **kwargs: self(forward, args, kwargs)

    def __call__(self, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what ``forward`` would return, or what the plan makes of earlier outputs.

        Raises:
            ConfigError: the call is none of the plan's.
        """
        arguments = bound_arguments(self._module_type, args, kwargs)
        self._check(arguments)
        generation = self._generations.current()
        try:
            timestep = torch.as_tensor(arguments[self._timestep])
            call = generation.calls.advance(
                read_timestep(timestep),
                self._shown(arguments),
                rows=len(arguments[self._site.latent]),
            )
            if call == FIRST:
                generation.branches = {}
                self._check_weights()
            branch = generation.branch(call)
            result = self._step(branch, call, forward, arguments)
            generation.calls.returned(output_of(result))
            return result
        except InterleavedError:
            raise  # the generation under way goes on
        except BaseException:
            generation.calls.reset()
            raise

    def _matched(self, module: nn.Module) -> Fingerprint | None:
        """Match the plan with ``module``; return its fingerprint, None where it is offloaded.

        Raises:
            ConfigError: the plan is for another model.
        """
        if is_offloaded(module):
            structure = module_structure(module)
            if structure != self._plan.model.structure:
                raise mismatch("model.structure", structure, self._plan.model.structure)
            log.warning(
                "ditfastattn: weights are not compared with the plan's: they are moved in part by "
                "part while the model runs"
            )
            return None
        found = module_fingerprint(module)
        check_fingerprint(found, self._plan.model)
        return found

    def _check_weights(self) -> None:
        """Match the plan again where weights have changed since the last generation began."""
        module = self._module()
        if module is None or is_offloaded(module):
            return
        if self._weights is not None and self._weights.equal(weights_of(module)):
            return
        sampled = self._matched(module)
        if sampled == self._sampled:
            warn_of_unsampled_change()
        self._weights, self._sampled = self._seen(), sampled

    def _seen(self) -> SeenWeights | None:
        """Return what is compared of the weights; None where they are offloaded."""
        module = self._module()
        if module is None or is_offloaded(module):
            return None
        return SeenWeights(weights_of(module), self._weights_check)

    def _step(
        self,
        branch: _Branch,
        call: Call,
        forward: Forward,
        arguments: Mapping[str, Any],
    ) -> Any:
        step = call.step
        strategy = self._column[step]
        if not strategy.computes:
            made = self._reuse(branch, strategy, call, arguments[self._site.latent])
            return with_output(branch.form, made)
        result = forward(**arguments)
        branch.form = result
        if self._most:
            kept = output_of(result).detach().clone()  # a caller may write to what it gets
            width, tokens = sizes(kept.shape)
            if (width, tokens) != (self._site.head_dim, self._site.tokens):
                raise mismatch(
                    "sites (output)",
                    f"{tokens} x {width}",
                    f"{self._site.tokens} x {self._site.head_dim}",
                )
            branch.outputs = [kept, *branch.outputs][: self._most]
            branch.steps = [step, *branch.steps][: self._most]
        return result

    def _reuse(self, branch: _Branch, strategy: Strategy, call: Call, latent: Tensor) -> Tensor:
        assert strategy.combine is not None
        step, read = call.step, strategy.outputs_read
        outputs = branch.outputs[:read]
        if not strategy.fitted:
            gaps = gaps_before(branch.steps[::-1], read)
            made: Tensor = strategy.combine(outputs, strategy.factors(step - branch.steps[0], gaps))
            return made.clone() if made is outputs[0] else made
        rows = self._site.coefficients[step]
        wide = [output.float() for output in outputs]
        like = _shaped(latent.float(), wide[0])
        if call.halves == 1:
            whole: Tensor = strategy.combine([like, *wide], rows[min(call.branch, len(rows) - 1)])
            return whole.to(outputs[0].dtype)
        halves = [half for output in wide for half in output.chunk(2)]
        parts = zip(like.chunk(2), rows, strict=True)
        return torch.cat([strategy.combine([own, *halves], row) for own, row in parts]).to(
            outputs[0].dtype
        )

    def _begin(self) -> _Generation:
        return _Generation(Calls.of(self._plan.sampler, f"argument {self._timestep!r}"))

    def _shown(self, arguments: Mapping[str, Any]) -> Shown:
        latent = self._site.latent
        tensors = {key: item for key, item in arguments.items() if isinstance(item, Tensor)}
        conditions = sorted(tensors.keys() - {latent, self._timestep})
        return shown([tensors[latent]], [tensors[key] for key in conditions])

    def _check(self, arguments: Mapping[str, Any]) -> None:
        for name, expected in self._plan.inputs.items():
            item = arguments.get(name)
            got = tuple(item.shape[1:]) if isinstance(item, Tensor) else "absent"
            if got != expected:
                raise mismatch(f"inputs.{name} (shape without batch)", got, expected)
        if self._timestep not in arguments:
            raise ConfigError(
                "the call has no argument for the timestep",
                where="accelerate(timestep)",
                got=self._timestep,
                expected=", ".join(arguments),
                remedy="name the argument that holds it",
            )


def _shaped(latent: Tensor, output: Tensor) -> Tensor:
    """Return ``latent`` with as many channels as ``output``: zeros where it predicts variances."""
    axis = 2 if output.dim() == 3 else 1
    has, wanted = latent.shape[axis], output.shape[axis]
    if has >= wanted:
        return latent.narrow(axis, 0, wanted)
    return torch.cat([latent, torch.zeros_like(latent)], axis)
