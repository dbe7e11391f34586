"""Compile a transformer that a peer has hooked: whole, by blocks, or between the hooks."""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search.measure.contender import Contender
from ditfastattn.tools.bench.models import BenchModel
from ditfastattn.tools.bench.peers.base import Clock, Peer, Scope, Setting, Subject


class Form(StrEnum):
    """What is compiled of a hooked model."""

    EAGER = "eager"
    MODEL = "whole model"
    BLOCKS = "blocks"
    PARTS = "parts of blocks"  # what is between hooks inside the blocks


def forms_of(peer: Peer) -> tuple[Form, ...]:
    """Return the forms to try for ``peer``."""
    return tuple(Form) if peer.inside else (Form.EAGER, Form.MODEL, Form.BLOCKS)


def fresh_copy(transformer: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of the modules that shares the weights."""
    tensors = [*transformer.parameters(), *transformer.buffers()]
    return copy.deepcopy(transformer, {id(tensor): tensor for tensor in tensors})


class PeerContender(Contender):
    """Generate with a peer's transformer; each generation starts with empty caches."""

    def __init__(
        self, pipeline: Any, transformer: Any, prompts: Sequence[Prompt], scope: Scope
    ) -> None:
        """Take the context of each generation, too."""
        super().__init__(pipeline, transformer, prompts)
        self._scope = scope

    def generate(self, number: int) -> None:
        """Generate once."""
        with self._scope():
            super().generate(number)


def peer_contender(
    model: BenchModel,
    pipeline: Any,
    prompts: Sequence[Prompt],
    steps: int,
    peer: Peer,
    setting: Setting,
    form: Form,
    calibration: Any = None,
) -> PeerContender:
    """Return a fresh copy of the pipeline's transformer with ``peer`` applied, in ``form``."""
    transformer = fresh_copy(pipeline.transformer)
    subject = Subject(transformer, steps, model.guided, calibration=calibration)
    around = not peer.inside
    if form is Form.BLOCKS and around:  # before the hooks, which stay outside the compiled code
        _compile_forward(_blocks(transformer))
    if form is Form.PARTS:
        _compile_forward([part for block in _blocks(transformer) for part in block.children()])
    scope = peer.apply(subject, setting.options)
    if form is Form.BLOCKS and not around:
        for block in _blocks(transformer):
            block.compile()
    called: Any = torch.compile(transformer) if form is Form.MODEL else transformer
    clock = subject.clock if peer.reads_timestep else None
    swap = peer.unconditional_first and model.conditional_first and model.guided
    stand_in = _Called(called, clock, model.timestep_scale, swap)
    return PeerContender(pipeline, stand_in, prompts, scope)


class _Called(torch.nn.Module):
    """Replace a peer's transformer in the pipeline: set its clock, swap the guidance halves."""

    def __init__(
        self, model: torch.nn.Module, clock: Clock | None, scale: float, swap: bool
    ) -> None:
        super().__init__()
        self.model = model
        self._clock, self._scale, self._swap = clock, scale, swap

    def forward(self, *args: Any, timestep: Tensor, **kwargs: Any) -> Any:
        """Call the model."""
        if self._clock is not None:
            self._clock.timestep = int(timestep.flatten()[0] * self._scale)
        if not self._swap:
            return self.model(*args, timestep=timestep, **kwargs)
        swapped = {name: _swapped(item) for name, item in kwargs.items()}
        result = self.model(*map(_swapped, args), timestep=_swapped(timestep), **swapped)
        if isinstance(result, tuple):
            return (_swapped(result[0]), *result[1:])
        result.sample = _swapped(result.sample)
        return result

    def __getattr__(self, name: str) -> Any:
        """Return the model's own attribute where this module has none."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


def _swapped(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    first, second = value.chunk(2)
    return torch.cat([second, first])


def _blocks(transformer: torch.nn.Module) -> Generator[torch.nn.Module]:
    for child in transformer.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from child


def _compile_forward(modules: Any) -> None:
    for module in modules:
        module.forward = torch.compile(module.forward)
