"""Write a whole generation as one graph: noise and conditions in, latents out.

Each step is its variant's graph with a known timestep, so that what depends on that alone is
computed at export; the steps share their weights. Guidance and scheduler are a few sums in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import onnx
import torch
from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.export.batch import BatchSize, Shape, Size
from ditfastattn.export.call_programs import CallProgram
from ditfastattn.export.emitter import Emitter, Value
from ditfastattn.export.step_graphs import StepGraph, used_inputs
from ditfastattn.export.to_onnx import emit, finish
from ditfastattn.export.weights import Weights
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.runtime.bundle.specs import BATCH, SECOND_CALL
from ditfastattn.runtime.bundle.stepping import LinearStep, Stepping, Terms

LOOP_FILE = "loop.onnx"
NOISE, LATENTS = "noise", "latents"


@dataclass(frozen=True)
class LoopSource:
    """Hold the parts of a loop.

    Attributes:
        graphs: the variants.
        hoisted: what is computed once, or None.
        programs: the caches of each of a step's calls.
        schedules: the number of the variant that each call runs at each step, None without it.
        stepping: what the sampler does between the steps.
        timesteps: the model's timestep input at each step, ``[batch]`` of a guided one.
        latent: the name of the model's latent input.
        timestep: the name of its timestep input.
        layouts: how guidance reaches the model at each step.
        layout: the same where it is on.
        about: what the graph is, for its metadata.
    """

    graphs: tuple[StepGraph, ...]
    hoisted: StepGraph | None
    programs: tuple[CallProgram, ...]
    schedules: tuple[tuple[int | None, ...], ...]
    stepping: Stepping
    timesteps: tuple[Tensor, ...]
    latent: str
    timestep: str
    layouts: tuple[CfgLayout, ...]
    layout: CfgLayout
    about: Mapping[str, str]


@dataclass(frozen=True)
class Loop:
    """Hold the written loop, its noise input and its conditions."""

    model: onnx.ModelProto
    noise: Value
    conditions: tuple[Value, ...]


def write_loop(source: LoopSource, weights: Weights) -> Loop:
    """Return the loop's graph; its weights are those of the variants."""
    first = source.graphs[0]
    slots = {slot for graph in source.graphs for slot in graph.reads}
    inputs = {value.name: value for value in first.inputs if value.name not in slots}
    conditions = tuple(
        value for name, value in inputs.items() if name not in (source.latent, source.timestep)
    )
    latent = inputs[source.latent]
    batched = source.layout.batched
    noise = Value(NOISE, _halved(latent.shape) if batched else latent.shape, latent.dtype)
    emitter = Emitter(weights, prefix="start/")
    own = [_Call(source.programs[0], source.schedules[0], {v.name: v for v in conditions})]
    if len(source.programs) > 1:
        others = {v.name: replace(v, name=f"{SECOND_CALL}.{v.name}") for v in conditions}
        own.append(_Call(source.programs[1], source.schedules[1], others, f"{SECOND_CALL}/"))
    latents = _Writer(source, emitter, noise, latent, own).run()
    used = _used(emitter, [value for call in own for value in call.conditions.values()])
    model = finish(emitter, "loop", [noise, *used], [(LATENTS, latents)], BATCH, source.about)
    return Loop(model, noise, used)


def _used(emitter: Emitter, conditions: Sequence[Value]) -> tuple[Value, ...]:
    read = {name for node in emitter.nodes for name in node.input}
    return tuple(value for value in conditions if value.name in read)


def _halved(shape: Shape) -> Shape:
    batch = shape[0]
    half: Size = batch // 2 if isinstance(batch, int) else BatchSize(batch.factor / 2)
    return (half, *shape[1:])


@dataclass
class _Call:
    """One of a step's calls: what it is given, and what it keeps between the steps."""

    program: CallProgram
    schedule: tuple[int | None, ...]
    conditions: Mapping[str, Value]
    prefix: str = ""
    once: dict[str, Value] = field(default_factory=dict)
    caches: dict[str, Value] = field(default_factory=dict)

    def move(self, step: int, adopted: bool) -> None:
        """Rename caches before ``step`` adopts, or writes, what replaces them."""
        moves = self.program.slots.moves_at(step, adopted)
        self.caches |= {str(slot): self.caches[str(source)] for slot, source in moves}

    def adopt(self, step: int, written: Mapping[str, Value]) -> None:
        """Take over what the step's first call has written."""
        self.move(step, adopted=True)
        self.caches |= {s: written[s] for s in map(str, self.program.slots.adopted_at(step))}

    def keep(self, step: int, written: Mapping[str, Value]) -> None:
        """Keep what ``step`` has written, and drop what no later step reads."""
        self.move(step, adopted=False)
        self.caches |= written
        live = set(map(str, self.program.slots.live_after(step)))
        self.caches = {slot: value for slot, value in self.caches.items() if slot in live}


class _Writer:
    """Write the steps one after another; ``latent`` is the model's input, ``noise`` the loop's."""

    def __init__(
        self,
        source: LoopSource,
        emitter: Emitter,
        noise: Value,
        latent: Value,
        calls: Sequence[_Call],
    ) -> None:
        self.source, self.emitter = source, emitter
        self.calls: dict[CfgLayout, Sequence[_Call]] = {source.layout: calls}
        self.noise, self.latent = noise, latent
        self.batches: dict[CfgLayout, str] = {}  # a value with the rows of a call, if free
        self.clipped: list[Value] = []

    def run(self) -> Value:
        """Write all steps; return the last latents."""
        source, emitter = self.source, self.emitter
        latents, outputs = [self._scaled(self.noise, source.stepping.noise_scale)], list[Value]()
        for step, (how, layout) in enumerate(
            zip(source.stepping.steps, source.layouts, strict=True)
        ):
            emitter.prefix = f"step_{step}/"
            given = self._model_input(self._scaled(latents[-1], how.input_scale), layout)
            calls = self._begun(layout, given)
            found = [self._model(step, calls, index, given) for index in range(len(calls))]
            emitter.prefix = f"step_{step}/"
            outputs.append(self._guided(found, layout))
            latents.append(self._next(how, latents, outputs))
        return latents[-1]

    def _begun(self, layout: CfgLayout, latents: Value) -> Sequence[_Call]:
        """Return the calls of a step with ``layout``; the first one writes the hoisted values."""
        begins = layout not in self.batches
        self.batches.setdefault(layout, latents.name)
        if isinstance(self.latent.shape[0], BatchSize):
            self.emitter.batch = self.batches[layout]
        if begins:
            if layout not in self.calls:
                self.calls[layout] = [self._unguided()]
            for call in self.calls[layout]:
                self.emitter.prefix = f"start/{call.prefix}"
                call.once = self._prologue(call.conditions)
        return self.calls[layout]

    def _unguided(self) -> _Call:
        """Return the call of a step without guidance, which is given the conditional part."""
        source = self.source
        self.emitter.prefix = "start/unguided/"
        graphs = [*source.graphs, *([source.hoisted] if source.hoisted else [])]
        used = {value.name for graph in graphs for value in used_inputs(graph)}
        whole = self.calls[source.layout][source.layout.conditional_call].conditions
        conditions = {name: self._half(v) if name in used else v for name, v in whole.items()}
        return _Call(source.programs[0], source.schedules[0], conditions, "unguided/")

    def _half(self, condition: Value) -> Value:
        """Return the conditional half of a condition, if that has the rows of a batch."""
        layout, name = self.source.layout, condition.name
        for axis, size in enumerate(condition.shape if layout.batched else ()):
            if isinstance(size, BatchSize):
                name = self.emitter.halves(name, axis)[layout.conditional_half]
        return replace(condition, name=name)

    def _prologue(self, conditions: Mapping[str, Value]) -> dict[str, Value]:
        graph = self.source.hoisted
        if graph is None:
            return {}
        given = [conditions.get(value.name, value) for value in graph.inputs]
        return dict(zip(graph.writes, emit(self.emitter, graph.source, given), strict=True))

    def _model(self, step: int, calls: Sequence[_Call], index: int, latents: Value) -> Value:
        """Write one of the ``calls`` of ``step``; return what the model returns in it."""
        source, call = self.source, calls[index]
        self.emitter.prefix = f"step_{step}/{call.prefix}"
        variant = call.schedule[step]
        assert variant is not None  # the step has this call
        graph = source.graphs[variant]
        timestep = source.timesteps[step]
        known = {
            source.latent: latents,
            source.timestep: self._timestep(step, timestep),
            **call.conditions,
            **call.once,
            **call.caches,
            **{
                str(slot): _constant(f"{self.emitter.prefix}{slot}", torch.tensor(number))
                for slot, number in call.program.slots.factors[step].items()
            },
        }
        results = emit(self.emitter, graph.source, [known[value.name] for value in graph.inputs])
        written = dict(zip(graph.writes, results[len(graph.results) :], strict=True))
        call.keep(step, written)
        for other in calls[index + 1 :]:
            other.adopt(step, written)
        return results[0]

    def _timestep(self, step: int, timestep: Tensor) -> Value:
        """Return the timestep of the batch; if the batch is free, one row that is broadcast."""
        alike = bool((timestep == timestep.flatten()[0]).all())
        if not isinstance(self.latent.shape[0], BatchSize):
            return _constant(f"timestep_{step}", timestep)
        if not alike or timestep.dim() > 1:
            raise ConfigError("the timestep differs within the batch", where=f"step {step}")
        if timestep.dim() == 0:
            return _constant(f"timestep_{step}", timestep)
        one = self.emitter.constant(timestep[:1])
        shape: Shape = (BatchSize(Fraction(1)),)
        name = self.emitter.op("Expand", one, self.emitter.sizes(shape), name="timestep")
        return Value(name, shape, timestep.dtype)

    def _model_input(self, latents: Value, layout: CfgLayout) -> Value:
        if not layout.batched:
            return replace(self.latent, name=latents.name)
        name = self.emitter.op("Concat", latents.name, latents.name, axis=0, name="lanes")
        return replace(self.latent, name=name)

    def _guided(self, outputs: Sequence[Value], layout: CfgLayout) -> Value:
        """Apply guidance to the outputs of a step's calls, without their learned variance."""
        emitter = self.emitter
        names = [self._prediction(output) for output in outputs]
        if layout is CfgLayout.NONE:
            return replace(self.noise, name=names[0])
        if layout.batched:
            names = emitter.split("Split", names[0], count=2, axis=0, num_outputs=2, name="halves")
        first = layout in (CfgLayout.COND_FIRST, CfgLayout.SEPARATE)
        conditional, unconditional = names if first else names[::-1]
        difference = emitter.op("Sub", conditional, unconditional)
        scale = emitter.scalar(self.source.stepping.guidance_scale, self.noise.dtype)
        name = emitter.op("Add", unconditional, emitter.op("Mul", difference, scale), name="guided")
        return replace(self.noise, name=name)

    def _prediction(self, output: Value) -> str:
        """Return an output without its learned variance."""
        channels, name = self.source.stepping.channels, self.emitter.use(output)
        if not channels:
            return name
        cuts = [self.emitter.ints([number]) for number in (0, channels, 1)]
        return self.emitter.op("Slice", name, *cuts, name="noise_prediction")

    def _next(self, how: LinearStep, latents: Sequence[Value], outputs: Sequence[Value]) -> Value:
        """Return the next latents; what the scheduler clips is kept for later steps."""
        if how.clip is not None:
            terms = [(latents, how.clip.latents), (outputs, how.clip.outputs)]
            image = self._sum("image", *terms)
            bounds = [self.emitter.scalar(b, image.dtype) for b in (how.clip.low, how.clip.high)]
            name = self.emitter.op("Clip", image.name, *bounds, name="clipped")
            self.clipped.append(replace(image, name=name))
        else:
            self.clipped.append(latents[-1])  # stands at its place; no factor refers to it
        return self._sum(
            "latents", (latents, how.latents), (outputs, how.outputs), (self.clipped, how.clipped)
        )

    def _sum(self, label: str, *terms: tuple[Sequence[Value], Terms]) -> Value:
        scaled = [self._scaled(held[-1 - ago], factor) for held, t in terms for ago, factor in t]
        total = scaled[0]
        for term in scaled[1:]:
            total = replace(total, name=self.emitter.op("Add", total.name, term.name, name=label))
        return total

    def _scaled(self, value: Value, factor: float) -> Value:
        if factor == 1.0:
            return value
        scale = self.emitter.scalar(factor, value.dtype)
        return replace(value, name=self.emitter.op("Mul", value.name, scale, name="scaled"))


def _constant(name: str, tensor: Tensor) -> Value:
    return Value(name, tuple(tensor.shape), tensor.dtype, tensor)
