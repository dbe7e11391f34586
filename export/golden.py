"""Compute a bundle's golden sample: one generation by torch, so that any port can check itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.fx.node import map_aggregate

from ditfastattn.core.errors import ConfigError
from ditfastattn.export.batch import BatchSize
from ditfastattn.export.call_programs import CallProgram
from ditfastattn.export.prepare import PreparedModel
from ditfastattn.export.step_graphs import StepGraph, spec
from ditfastattn.export.to_onnx import GraphSource
from ditfastattn.passes.graph.slots import Slot, parse_slot
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.runtime.bundle.arguments import as_pairs
from ditfastattn.runtime.bundle.golden import LATENTS, NOISE, input_name, output_name
from ditfastattn.runtime.bundle.stepping import Stepper, Stepping, first_noise, guided
from ditfastattn.runtime.bundle.unguided import conditional_inputs
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
class _Call:
    """One of a step's calls: its inputs, and what it keeps between the steps."""

    program: CallProgram
    schedule: tuple[int | None, ...]
    given: dict[str, Tensor]
    batch: int
    hoisted: Mapping[Slot, Tensor]
    caches: Caches = field(default_factory=Caches)


@dataclass
class _Sample:
    prepared: PreparedModel
    graphs: Sequence[StepGraph]
    once: StepGraph | None
    stepping: Stepping | None

    def run(self) -> dict[str, Tensor]:
        """Run all steps."""
        prepared, stepping = self.prepared, self.stepping
        guiding = self._calls()
        unguided = self._unguided(guiding)
        first = guiding[0].given
        timesteps = self._timesteps(first[prepared.timestep])
        computed = {prepared.timestep} if prepared.plan else set()
        computed |= {prepared.latent} if stepping else set()
        found = {
            input_name(name, index): item.clone() if index else item  # a file holds each once
            for index, call in enumerate(guiding)
            for name, item in call.given.items()
            if name not in computed
        }
        stepper = None
        if stepping is not None:
            found[NOISE] = self._noise(first[prepared.latent], stepping)
            stepper = Stepper(stepping, found[NOISE])
        for step, (timestep, layout) in enumerate(zip(timesteps, prepared.layouts, strict=True)):
            calls = unguided if layout is CfgLayout.NONE else guiding
            now = {prepared.timestep: timestep}
            if layout is CfgLayout.NONE:
                now = self._conditional(now)
            if stepper is not None:
                rows = torch.cat([stepper.model_input] * (2 if layout.batched else 1))
                now[prepared.latent] = rows.to(first[prepared.latent].dtype)
            outputs: list[Tensor] = []
            for index, call in enumerate(calls):
                results = self._step(step, call, calls[index + 1 :], now)
                for value, result in zip(self.graphs[0].results, results, strict=True):
                    found[output_name(step, value.name, index)] = result.clone()
                outputs.append(results[0].float())
            if stepper is not None and stepping is not None:
                stepper.step(guided(torch.cat(outputs), stepping, layout))
        if stepper is not None:
            found[LATENTS] = stepper.latents[-1]
        return found

    def _calls(self) -> list[_Call]:
        """Return the calls of a step; both are given the same latents."""
        prepared = self.prepared
        batch = prepared.call.batch
        first = {entry.name: as_pairs(tensor) for entry, tensor in prepared.arguments()}
        if prepared.layout.batched and prepared.latent and prepared.programs[0].shares_guidance:
            half = first[prepared.latent].tensor_split(2)[0]
            first[prepared.latent] = torch.cat([half, half])
        latents = {name: item for name, item in first.items() if name == prepared.latent}
        other = {name: as_pairs(tensor) for name, tensor in prepared.other.items()}
        inputs = (first, {**other, **latents})
        return [
            _Call(program, prepared.schedule(program), given, batch, self._hoisted(given, batch))
            for program, given in zip(prepared.programs, inputs, strict=False)
        ]

    def _unguided(self, calls: Sequence[_Call]) -> Sequence[_Call]:
        """Return the call of a step without guidance, which is given the conditional part."""
        prepared, layout = self.prepared, self.prepared.layout
        if layout is CfgLayout.NONE or CfgLayout.NONE not in prepared.layouts:
            return calls
        program = prepared.programs[0]
        given = self._conditional(calls[layout.conditional_call].given)
        batch = prepared.call.batch // (2 if layout.batched else 1)
        hoisted = self._hoisted(given, batch)
        return [_Call(program, prepared.schedule(program), given, batch, hoisted)]

    def _conditional(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        specs = map(spec, self.graphs[0].inputs)
        return conditional_inputs(given, specs, self.prepared.layout)

    def _noise(self, latents: Tensor, stepping: Stepping) -> Tensor:
        """Return the noise of a generation that begins with ``latents``, if guided; else some."""
        found: Tensor = first_noise(latents, stepping, self.prepared.layout)
        if self.prepared.layouts[0] is self.prepared.layout:
            return found
        return torch.randn(found.shape, generator=torch.Generator().manual_seed(0))

    def _hoisted(self, given: Mapping[str, Tensor], batch: int) -> dict[Slot, Tensor]:
        if self.once is None:
            return {}
        values = _run(self.once, given, batch)
        return dict(zip(map(parse_slot, self.once.writes), values, strict=True))

    def _timesteps(self, example: Tensor) -> list[Tensor]:
        if self.prepared.plan is None:
            return [example]
        if bool((example != example.flatten()[0]).any()):
            raise ConfigError("the timestep differs within the batch", where="the golden sample")
        return [torch.full_like(example, at) for at in self.prepared.plan.sampler.timesteps]

    def _step(
        self, step: int, call: _Call, following: Sequence[_Call], now: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """Return the model's outputs at ``step``; keep and hand on what it has written."""
        index, slots = call.schedule[step], call.program.slots
        assert index is not None  # the step has this call
        graph = self.graphs[index]
        read = [parse_slot(name) for name in graph.reads]
        device = call.given[self.prepared.timestep].device
        if self.prepared.plan is not None:
            held = call.caches.read(slots, step, read, device, call.hoisted)
        else:
            held = [call.hoisted[slot] for slot in read]
        caches = dict(zip(graph.reads, held, strict=True))
        returned = _run(graph, {**call.given, **now, **caches}, call.batch)
        count = len(graph.results)
        if self.prepared.plan is not None:
            kept = dict(zip(map(parse_slot, graph.writes), returned[count:], strict=True))
            call.caches.write(slots, step, kept)
            for other in following:
                adopted = other.program.slots.adopted_at(step)
                taken = {slot: kept[slot] for slot in adopted}
                other.caches.adopt(other.program.slots, step, taken)
        return returned[:count]


def _run(graph: StepGraph, given: Mapping[str, Tensor], batch: int) -> list[Tensor]:
    """Return what ``graph`` returns at ``batch``, given its inputs by name."""
    source = graph.source
    rest = iter(graph.inputs)
    placeholders = source.module.graph.find_nodes(op="placeholder")
    arguments = [
        source.static[at][1] if at in source.static else given[next(rest).name]
        for at in range(len(placeholders))
    ]
    returned = _AtBatch(source, batch).run(*arguments)
    return [item for item in returned if isinstance(item, Tensor)]


class _AtBatch(Interpreter):
    """Run a graph with the numbers of a batch in the place of the captured one's."""

    def __init__(self, source: GraphSource, batch: int) -> None:
        super().__init__(source.module)
        self._symbols, self._batch = source.symbols, batch

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[Any, Any]:
        """Return the arguments of a node."""
        args, kwargs = self._symbols.args[n], self._symbols.kwargs[n]
        return self._of(args, n), self._of(kwargs, n)

    def _of(self, arguments: Any, node: Node) -> Any:
        def sized(item: Any) -> Any:
            return int(item.factor * self._batch) if isinstance(item, BatchSize) else item

        return self.map_nodes_to_values(map_aggregate(arguments, sized), node)
