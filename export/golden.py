"""Compute a bundle's golden sample: one generation by torch, so that any port can check itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Interpreter

from ditfastattn.core.errors import ConfigError
from ditfastattn.export.prepare import PreparedModel
from ditfastattn.export.step_graphs import StepGraph
from ditfastattn.passes.graph.slots import Slot, parse_slot
from ditfastattn.runtime.bundle.golden import INPUT, LATENTS, NOISE, output_name
from ditfastattn.runtime.bundle.stepping import Stepper, Stepping, first_noise, guided
from ditfastattn.runtime.caches import Caches


def golden_sample(
    prepared: PreparedModel,
    graphs: Sequence[StepGraph],
    once: StepGraph | None,
    stepping: Stepping | None,
) -> dict[str, Tensor]:
    """Return the tensors of a golden sample, by name: see ``runtime.bundle.golden``.

    Raises:
        ConfigError: the timestep differs within the batch.
    """
    with torch.no_grad():
        return _Sample(prepared, graphs, once, stepping).run()


@dataclass
class _Sample:
    prepared: PreparedModel
    graphs: Sequence[StepGraph]
    once: StepGraph | None
    stepping: Stepping | None
    caches: Caches = field(default_factory=Caches)

    def run(self) -> dict[str, Tensor]:
        """Run all steps."""
        prepared, stepping = self.prepared, self.stepping
        given = {entry.name: tensor for entry, tensor in prepared.arguments()}
        timesteps = self._timesteps(given[prepared.timestep])
        if prepared.latent and prepared.program.shares_guidance:
            half = given[prepared.latent].tensor_split(2)[0]
            given[prepared.latent] = torch.cat([half, half])
        computed = {prepared.timestep} if prepared.plan else set()
        computed |= {prepared.latent} if stepping else set()
        found = {INPUT + name: item for name, item in given.items() if name not in computed}
        stepper = None
        if stepping is not None:
            found[NOISE] = first_noise(given[prepared.latent], stepping, prepared.layout)
            stepper = Stepper(stepping, found[NOISE])
        hoisted = dict(zip(self._once(), _run(self.once, given), strict=True)) if self.once else {}
        for step, timestep in enumerate(timesteps):
            now = {**given, prepared.timestep: timestep}
            if stepper is not None:
                rows = torch.cat([stepper.model_input] * (2 if prepared.layout.batched else 1))
                now[prepared.latent] = rows.to(given[prepared.latent].dtype)
            results = self._step(step, now, hoisted)
            for value, result in zip(self.graphs[0].results, results, strict=True):
                found[output_name(step, value.name)] = result.clone()
            if stepper is not None and stepping is not None:
                stepper.step(guided(results[0].float(), stepping, prepared.layout))
        if stepper is not None:
            found[LATENTS] = stepper.latents[-1]
        return found

    def _timesteps(self, example: Tensor) -> list[Tensor]:
        if self.prepared.plan is None:
            return [example]
        if bool((example != example.flatten()[0]).any()):
            raise ConfigError("the timestep differs within the batch", where="the golden sample")
        return [torch.full_like(example, at) for at in self.prepared.plan.sampler.timesteps]

    def _once(self) -> list[Slot]:
        return [parse_slot(name) for name in self.once.writes] if self.once else []

    def _step(
        self, step: int, given: Mapping[str, Tensor], hoisted: Mapping[Slot, Tensor]
    ) -> list[Tensor]:
        """Return the model's outputs at ``step``; keep what it has written."""
        program = self.prepared.program
        graph = self.graphs[program.schedule[step]]
        slots = [parse_slot(name) for name in graph.reads]
        device = given[self.prepared.timestep].device
        if self.prepared.plan is not None:
            held = self.caches.read(program.slots, step, slots, device, hoisted)
        else:
            held = [hoisted[slot] for slot in slots]
        returned = _run(graph, {**given, **dict(zip(graph.reads, held, strict=True))})
        count = len(graph.results)
        written = map(parse_slot, graph.writes)
        if self.prepared.plan is not None:
            kept = dict(zip(written, returned[count:], strict=True))
            self.caches.write(program.slots, step, kept)
        return returned[:count]


def _run(graph: StepGraph, given: Mapping[str, Tensor]) -> list[Tensor]:
    """Return what ``graph`` returns, given its inputs by name."""
    source = graph.source
    rest = iter(graph.inputs)
    placeholders = source.module.graph.find_nodes(op="placeholder")
    arguments = [
        source.static[at][1] if at in source.static else given[next(rest).name]
        for at in range(len(placeholders))
    ]
    returned = Interpreter(source.module).run(*arguments)
    return [item for item in returned if isinstance(item, Tensor)]
