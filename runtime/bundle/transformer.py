"""Stand in for a pipeline's transformer with the graphs of a bundle."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.graph.slots import parse_slot
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.runtime.bundle.arguments import BundleArguments, check_range
from ditfastattn.runtime.bundle.guards import check_guards
from ditfastattn.runtime.bundle.manifest import Manifest
from ditfastattn.runtime.bundle.slots import slot_schedule, slots_read, slots_written
from ditfastattn.runtime.bundle.specs import SECOND_CALL, TensorSpec
from ditfastattn.runtime.caches import Buffers
from ditfastattn.runtime.call_order import FIRST, Call
from ditfastattn.runtime.calls import InterleavedError
from ditfastattn.runtime.clock import read_timestep
from ditfastattn.runtime.current_generation import PerGeneration, shown
from ditfastattn.runtime.generation import Generation, GuidanceBranch
from ditfastattn.runtime.halves import warn_of_unchecked_latents
from ditfastattn.runtime.hoisted import NO_VALUES, Values
from ditfastattn.runtime.trace import Shown

Engine = Callable[[Sequence[Tensor], Sequence[Tensor]], None]  # from inputs into outputs


class Config(dict[str, Any]):
    """Hold the transformer's configuration, read as ``config.name`` or ``config["name"]``."""

    def __getattr__(self, name: str) -> Any:
        """Return an entry."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass
class _State:
    """The generation under way, and the memory that its caches are written into."""

    generation: Generation
    buffers: Buffers = field(default_factory=Buffers)
    batch: int = 0

    def keep_batch(self, call: Call, batch: int) -> None:
        """Refuse another batch within a generation; a new one may have another."""
        if call == FIRST:
            if batch != self.batch:
                self.buffers.clear()
            self.batch = batch
        elif batch != self.batch:
            raise ConfigError(
                "the batch has changed within a generation",
                where=f"step {call.step}",
                got=batch,
                expected=self.batch,
            )


class BundleTransformer(nn.Module):
    """Answer as the exported transformer does, step by step of its schedule.

    It takes the arguments of the original's forward, and has its config, dtype and a device. The
    clock and caches are one set per thread.
    """

    def __init__(
        self,
        manifest: Manifest,
        engines: Sequence[Engine],
        hoisted: Engine | None,
        device: torch.device,
        open_loop: Callable[[], Engine],
        providers: tuple[str, ...],
    ) -> None:
        """Take one engine per variant, one for the hoisted values if there are any.

        ``open_loop`` opens the engine of the loop when it is needed; ``providers`` names the
        execution providers that have loaded.
        """
        super().__init__()
        self.providers = providers
        self.weights: Mapping[str, Tensor] = {}  # those that the engines compute with, if shared
        self.manifest = manifest
        self.config = Config(manifest.model.config)
        self._engines, self._hoisted_engine = tuple(engines), hoisted
        self._device = device
        self._arguments = BundleArguments(manifest, device)
        self._open_loop = functools.cache(open_loop)
        self._schedules = [
            [slot_schedule(each, steps) for each in manifest.calls[: layout.calls]]
            for steps, layout in manifest.sampler.spans
        ]
        self._scheduled = [each.schedule for each in manifest.calls]
        self._reads = tuple(map(slots_read, manifest.variants))
        self._writes = tuple(map(slots_written, manifest.variants))
        self._slots = {parse_slot(spec.name): spec for spec in manifest.every_slot}
        self._states = PerGeneration(self._begin)
        if manifest.shares_guidance and not manifest.latent:
            warn_of_unchecked_latents([spec.name for spec in manifest.inputs])

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the latents."""
        found: torch.dtype = getattr(torch, self.manifest.model.dtype)
        return found

    @property
    def device(self) -> torch.device:
        """Return where the tensors must be."""
        return self._device

    @contextmanager
    def cache_context(self, name: str) -> Generator[None]:
        """Accept diffusers' naming of guidance branches; ours are told apart by their order."""
        yield

    def reset(self) -> None:
        """Forget the generation under way in this thread, for example after an interrupted one."""
        self._states.current().generation.reset()

    def generate(self, noise: Tensor, **conditions: Any) -> Tensor:
        """Return the latents of a whole generation, by the bundle's unrolled loop.

        Args:
            noise: standard normal, the shape of the latents, one row per image.
            **conditions: the model's other arguments, both halves of guidance as it takes them.
                Where guidance takes two calls a step, ``second`` holds those of the second one.

        Raises:
            ConfigError: the bundle has no loop, or an argument is not the loop's.
            EngineError: the runtime failed.
        """
        engine = self._open_loop()
        loop = self.manifest.loop
        assert loop is not None  # it was opened
        batch = len(noise) * (2 if self.manifest.sampler.cfg_layout.batched else 1)
        given = {**conditions, loop.noise.name: noise}
        self._arguments.check_settings(given)
        tensors = self._arguments.tensors([loop.noise, *loop.conditions], given, batch)
        self._check_guards(given, batch)
        latents = self._empty(loop.noise, batch)
        engine(list(tensors.values()), [latents])
        return latents

    def _check_guards(self, given: Mapping[str, Any], batch: int) -> None:
        """Compare what a whole generation is given with the guards, for each call of a step."""
        guards = self.manifest.guards
        names = {guard.name for guard in guards}
        specs = [spec for spec in self.manifest.inputs if spec.name in names]
        second = [given.get(SECOND_CALL, {})] if self.manifest.second else []
        for call in [given, *second] if guards else []:
            check_guards(guards, self._arguments.tensors(specs, call, batch))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run one step; arguments and result are those of the exported model.

        Raises:
            ConfigError: an argument's shape or dtype is not the bundle's, or the timestep is not
                the schedule's.
            EngineError: the runtime failed.
        """
        given = self.bind(args, kwargs)
        state = self._states.current()
        try:
            results = self._step(state, given)
        except InterleavedError:
            raise  # the generation under way goes on
        except BaseException:
            state.generation.reset()
            raise
        return self.answer(results, given)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name, as the model's forward would take them."""
        return self._arguments.bind(args, kwargs)

    def answer(self, results: list[Tensor], given: Mapping[str, Any]) -> Any:
        """Return ``results`` as the model's forward would, called with ``given``."""
        return tuple(results) if given.get("return_dict", True) is False else _output(results)

    def _begin(self) -> _State:
        where = f"argument {self.manifest.timestep!r}"
        return _State(Generation(self.manifest.sampler, where))

    def _step(self, state: _State, given: Mapping[str, Any]) -> list[Tensor]:
        manifest, generation = self.manifest, state.generation
        batch = self._arguments.batch(given)
        inputs = self._arguments.tensors(manifest.inputs, given, batch)
        call = self._advance(generation, inputs, batch)
        guided = manifest.sampler.layouts[call.step] is not CfgLayout.NONE
        if guided:
            self._arguments.check_multiple(batch, manifest.batch_multiple)
        generation.follow(call, self._schedules[call.phase])
        state.keep_batch(call, batch if guided or not manifest.halved else 2 * batch)
        if call.step == 0 and manifest.latent:
            check_range(manifest.latent, inputs[manifest.latent])
        if guided and generation.begins_phase(call) and manifest.shares_guidance:
            named = {f"argument {name!r}": inputs[name] for name in [manifest.latent] if name}
            generation.check_latents(call, named)
        index = self._scheduled[call.branch][call.step]
        assert index is not None  # this step has this call
        variant, written = manifest.variants[index], self._writes[index]
        hoisted = self._once(generation.branch(call), inputs, batch)
        caches = generation.read(call, self._reads[index], self._device, hoisted)
        tensors = [*(inputs[name] for name in variant.inputs), *caches]
        results = [self._empty(spec, batch) for spec in manifest.outputs]
        specs = [self._slots[slot] for slot in written]
        wanted = [(spec.sizes(batch), spec.torch_dtype) for spec in specs]
        held = [branch.caches for branch in generation.branches(call)]
        free = state.buffers.take(wanted, self._device, held)
        self._engines[index](tensors, [*results, *free])
        generation.write(call, dict(zip(written, free, strict=True)), results[0])
        return results

    def _advance(self, generation: Generation, inputs: Mapping[str, Tensor], batch: int) -> Call:
        if self.manifest.plan_sha256:
            timestep = read_timestep(inputs[self.manifest.timestep])
            rows = batch if self.manifest.halved else 0
            return generation.advance(timestep, self._shown(inputs), rows=rows)
        generation.reset()  # one dense step, at any timestep
        return Call(0, 0)

    def _shown(self, inputs: Mapping[str, Tensor]) -> Shown:
        manifest = self.manifest
        latents = [item for name, item in inputs.items() if name == manifest.latent]
        others = (manifest.latent, manifest.timestep)
        conditions = [item for name, item in inputs.items() if name not in others]
        return shown(latents, conditions)

    def _empty(self, spec: TensorSpec, batch: int) -> Tensor:
        return torch.empty(spec.sizes(batch), dtype=spec.torch_dtype, device=self._device)

    def _once(self, branch: GuidanceBranch, inputs: Mapping[str, Tensor], batch: int) -> Values:
        """Return the hoisted values; they and the guards are for the conditions of a generation.

        Both are looked at again where a condition has changed.
        """
        spec, hoisted, guards = self.manifest.hoisted, self._hoisted_engine, self.manifest.guards
        tensors = [inputs[name] for name in spec.inputs] if spec else []

        def compute() -> Values:
            check_guards(guards, inputs)
            if spec is None or hoisted is None:
                return NO_VALUES
            written = slots_written(spec)
            results = [self._empty(self._slots[slot], batch) for slot in written]
            hoisted(tensors, results)
            return dict(zip(written, results, strict=True))

        return branch.hoisted.of([*tensors, *(inputs[each.name] for each in guards)], compute)


def _output(results: list[Tensor]) -> Any:
    if len(results) != 1:
        return tuple(results)
    try:
        from diffusers.models.modeling_outputs import Transformer2DModelOutput
    except ImportError:
        return SimpleNamespace(sample=results[0])
    return Transformer2DModelOutput(sample=results[0])
