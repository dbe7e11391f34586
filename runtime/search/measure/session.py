"""Run generations of a pipeline whose transformer is one captured graph, stepped by a search.

A generation is an ordinary call of the pipeline; only the calls of its transformer are replaced, so
schedulers, guidance and decoding are the user's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.analysis.fingerprint import Fingerprint
from ditfastattn.passes.analysis.latent import latent_candidates
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.capture.captured_graph import CapturedGraph, GraphInput
from ditfastattn.passes.capture.dynamo import describe_inputs
from ditfastattn.passes.capture.plain_tensors import plain_tensors
from ditfastattn.passes.capture.traced import TracedCall
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.schema import Sampler
from ditfastattn.passes.rewrites.split_heads import Groups
from ditfastattn.runtime.clock import read_timestep
from ditfastattn.runtime.lowering import many_compilations
from ditfastattn.runtime.matching import check_shapes, rows_of
from ditfastattn.runtime.pipeline.denoiser import never_called, transformer_of
from ditfastattn.runtime.pipeline.forwards import Forward, check_not_accelerated, replace_forward
from ditfastattn.runtime.pipeline.guidance import detect_cfg_layout, guidance_of
from ditfastattn.runtime.pipeline.hooks import check_not_hooked
from ditfastattn.runtime.pipeline.model_call import by_name
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from ditfastattn.runtime.pipeline.sampler import describe_sampler
from ditfastattn.runtime.search.measure.call_log import (
    CallLog,
    ChangingCallsError,
    SearchedPhase,
)
from ditfastattn.runtime.search.measure.captured_model import (
    CapturedModel,
    ModelOptions,
    capture_model,
    model_of,
)
from ditfastattn.runtime.traced import BROKEN, TracedCalls, log_fallback, once_warm

Outputs = tuple[Any, ...]
_ALIKE = (
    "give every prompt the same number of images, resolution and length; texts of other lengths "
    "can be padded to one (text_length)"
)


class Stepper(Protocol):
    """Run one call of the transformer after another, over one generation."""

    def step(self, args: Sequence[Tensor]) -> Outputs:
        """Take the graph's flat inputs, return its outputs."""
        ...


_active: ContextVar[Session] = ContextVar("ditfastattn_search_session")


def _backend(module: GraphModule, _example: Sequence[Any]) -> Callable[..., Outputs]:
    """Pass the graph's calls to the active session; all sessions share this backend."""
    inputs = describe_inputs(module)

    def run(*args: Any) -> Outputs:
        return _active.get().take(module, inputs, args)

    return run


class _Call:
    """Call a transformer, captured by Dynamo or, where that fails, traced."""

    def __init__(
        self, session: Session, module: nn.Module, forward: Forward, compiled: Forward
    ) -> None:
        self._session, self._kind = session, type(module)
        self._forward, self._compiled = forward, compiled
        self._calls = TracedCalls(module, session.timestep)
        self._broken = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._session.searches_next():
            return self._forward(*args, **kwargs)
        if not self._broken:
            args, kwargs = by_name(self._kind, args, kwargs)
            try:
                return once_warm(
                    lambda: self._compiled(*args, **kwargs), self._forward, args, kwargs
                )
            except BROKEN as error:
                log_fallback(self._kind.__name__, error)
                self._broken = True
        with torch.no_grad():
            return self._session.take_traced(*self._calls.find(self._forward, args, kwargs))


class Session:
    """Run generations of a pipeline whose transformer is one captured graph."""

    def __init__(
        self,
        pipeline: Any,
        layout: CfgLayout,
        timestep: str,
        attention_only: bool,
        head_groups: int | Groups = 1,
        only: SearchedPhase | None = None,
    ) -> None:
        """Prepare; use ``open_session``."""
        self.only = only
        self.pipeline = pipeline
        self.head_groups = head_groups
        self._options = ModelOptions(timestep, attention_only, head_groups)
        self._original = pipeline.transformer
        self._undo: Callable[[], None] | None = None
        self._forward: Forward | None = None  # the captured one, while the pipeline holds it
        self.layout = layout
        self.guidance_scale: float | None = None
        self.timesteps: tuple[float, ...] = ()
        self.steps = 0
        self.forward_seconds = 0.0
        self.timestep = timestep
        self._model: CapturedModel | None = None
        self._traced: TracedCall | None = None
        self._stepper: Stepper | None = None
        self._log = CallLog()  # of the generation under way, or the last one

    @property
    def captured(self) -> CapturedGraph:
        """Return the graph of one step."""
        return self._known.captured

    @property
    def sites(self) -> tuple[Site, ...]:
        """Return the sites that a plan may change."""
        return self._known.sites

    def take_sites(self, sites: Sequence[Site]) -> None:
        """Replace the sites by the same ones with other windows or caches."""
        self._model = replace(self._known, sites=tuple(sites))

    @property
    def identity(self) -> Fingerprint:
        """Return the model's fingerprint."""
        return self._known.identity

    @property
    def example(self) -> tuple[Tensor, ...]:
        """Return flat inputs as the first call gave them."""
        return self._known.example

    @property
    def moving(self) -> tuple[int, ...]:
        """Return which flat inputs change from step to step: the timestep, the latent if known."""
        return (self._known.timestep, *latent_candidates(self.captured))

    @property
    def _known(self) -> CapturedModel:
        if self._model is None:
            raise LookupError("the session has not captured its model")
        return self._model

    def searches_next(self) -> bool:
        """Count a call of the transformer; return whether it is of the phase that is searched."""
        number, self._log.calls = self._log.calls, self._log.calls + 1
        if self.only is None or self._log.all_searched:
            return True
        order = self.only.order
        return number < len(order) and order[number] == self.only.number

    def hold(self) -> None:
        """Put the captured transformer into the pipeline."""
        plain = transformer_of(self.pipeline, "calibrate(pipeline)")
        self.pipeline.transformer = plain

        def captured(forward: Forward) -> Forward:
            compiled = torch.compile(forward, backend=_backend, fullgraph=True, dynamic=False)
            self._forward = _Call(self, plain, forward, compiled)
            return self._forward

        self._undo = replace_forward(plain, captured)

    def release(self) -> None:
        """Give the pipeline its own transformer back."""
        if self._undo is not None:
            self._undo()
        self.pipeline.transformer = self._original

    @contextmanager
    def holding(self) -> Generator[None]:
        """Put the captured transformer into the pipeline; give its own back at the end."""
        self.hold()
        try:
            yield
        finally:
            self.release()

    def sampler(self, timesteps: Sequence[float]) -> Sampler:
        """Describe the sampler, whose generations have ``timesteps``."""
        return describe_sampler(
            self.pipeline.scheduler, timesteps, self.guidance_scale, self.layout
        )

    def capture(self, prompt: Prompt) -> None:
        """Capture the model by its first step, time a warm forward pass, and count the steps.

        Raises:
            ConfigError: a generation does not call the transformer once a step.
        """
        self.guidance_scale = guidance_of(self.pipeline, prompt.call)
        stepper = _CountingStepper(self)
        self._generate(stepper, prompt)
        self.forward_seconds = stepper.seconds
        if not self._log.timesteps:
            raise never_called(self.pipeline, "a generation")
        calls = self.layout.calls
        self.steps = len(self._log.timesteps) // calls
        if not self._log.is_regular(calls, stepper.calls):
            often = "once" if calls == 1 else "twice"
            raise ChangingCallsError(
                f"a generation must call the transformer {often} a step",
                where="a generation",
                got=self._log.described(),
                expected=f"cfg_layout {self.layout}, from the first step to the last",
                remedy="keep guidance as it is from the first step to the last, without further "
                "calls such as skip-layer guidance; or say how it runs by cfg_layout",
            )

    def run(self, stepper: Stepper, prompt: Prompt) -> Any:
        """Generate with ``stepper``; return what the pipeline returns first: the images.

        Raises:
            ConfigError: the generation has other steps than the first one had.
        """
        images = self._generate(stepper, prompt)
        wanted = len(self.only.order) if self.only else len(self._log.timesteps)
        if len(self._log.timesteps) != self.steps * self.layout.calls or wanted != self._log.calls:
            raise ConfigError(
                "the generations of a search must have equal steps",
                where="a generation",
                got=f"{len(self._log.timesteps)} calls of the transformer",
                expected=self.steps * self.layout.calls,
                remedy="give every prompt the same steps",
            )
        return images

    def forward_by(self, stepper: Stepper) -> Forward:
        """Return what runs the model's calls, of a generation that others drive, by ``stepper``.

        Those of other phases are none of them.
        """
        log, forward = CallLog(all_searched=True), self._forward
        assert forward is not None

        def run(*args: Any, **kwargs: Any) -> Any:
            self._stepper, self._log = stepper, log
            token = _active.set(self)
            try:
                return forward(*args, **kwargs)
            finally:
                _active.reset(token)

        return run

    def _generate(self, stepper: Stepper, prompt: Prompt) -> Any:
        self._stepper, self._log = stepper, CallLog()
        token = _active.set(self)
        try:
            with self._log.following(self.pipeline):
                return generate(self.pipeline, prompt)
        finally:
            _active.reset(token)
            self.timesteps = tuple(self._log.timesteps[:: self.layout.calls])

    def take(self, module: GraphModule, inputs: tuple[GraphInput, ...], args: Any) -> Outputs:
        """Run one call of the transformer: ``module`` on the arguments ``args``."""
        if self._model is None:
            self._model = capture_model(module, inputs, args, self._options)
        return self._step(plain_tensors(args))

    def take_traced(self, call: TracedCall, tensors: list[Tensor], otherwise: str) -> Any:
        """Run one call of the transformer that was traced.

        ``otherwise`` says what the call reads otherwise than an earlier one, or "".

        Raises:
            ConfigError: it is another graph than that of the first call.
        """
        if self._model is None:
            self._traced = call
            self._model = model_of(call.captured, tensors, self._options)
        if call is not self._traced:
            raise ConfigError(
                "a search must call one graph of the transformer",
                where="a generation",
                got=otherwise or "a call of another structure or shape",
                remedy=_ALIKE,
            )
        return call.returned(self._step(tensors))

    def _step(self, tensors: list[Tensor]) -> Outputs:
        known = self._known
        wanted, got = (rows_of(known.captured, given) for given in (known.example, tensors))
        self._log.check_rows(wanted, got, self.layout.calls)
        check_shapes(
            known.captured,
            known.example,
            tensors,
            "a search must call one graph of the transformer, at one shape",
            _ALIKE,
        )
        self._log.note(read_timestep(tensors[known.timestep]).value())
        assert self._stepper is not None
        return self._stepper.step(tensors)


class _CountingStepper:
    """Run the first step alone, twice, the second time a warm one; return it at every step.

    ``calls`` counts runs of calls that are of one step for sure, with equal timesteps and latents.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._results: Outputs = ()
        self._last: tuple[Tensor, ...] = ()
        self.seconds = 0.0
        self.calls: list[int] = []

    def step(self, args: Sequence[Tensor]) -> Outputs:
        own = tuple(args[index].clone() for index in self._session.moving)
        same = bool(self._last) and all(map(torch.equal, own, self._last))
        self._last = own
        self.calls = [*self.calls[:-1], self.calls[-1] + 1] if same else [*self.calls, 1]
        if not self._results:
            module = self._session.captured.module
            module(*args)
            began = time.perf_counter()
            self._results = tuple(module(*args))
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - began
        return tuple(r.clone() if isinstance(r, Tensor) else r for r in self._results)


@contextmanager
def open_session(
    pipeline: Any,
    prompt: Prompt,
    cfg_layout: CfgLayout | None = None,
    timestep: str = "timestep",
    attention_only: bool = False,
    head_groups: int | Groups = 1,
    only: SearchedPhase | None = None,
) -> Generator[Session]:
    """Capture the transformer of ``pipeline`` while ``prompt`` runs; restore it at the end.

    ``cfg_layout`` is observed where None. With ``attention_only``, feed-forwards are not sites.
    ``head_groups`` is the number of groups to split the heads of each attention into, each a site
    of its own; or the sizes of the groups, by the attention's name. ``only`` is the phase to be
    searched, where there are several.

    Raises:
        ConfigError: the pipeline has no transformer, or one without attention sites.
    """
    transformer = transformer_of(pipeline, "calibrate(pipeline)")
    check_not_accelerated(transformer)
    check_not_hooked(transformer)
    if cfg_layout is None:
        cfg_layout = detect_cfg_layout(pipeline, prompt.call, timestep)
    session = Session(pipeline, cfg_layout, timestep, attention_only, head_groups, only)
    session.hold()
    try:
        with many_compilations():
            session.capture(prompt)
            yield session
    finally:
        session.release()
