"""Calibrate a plan for a diffusers pipeline by running one generation of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import GraphModule

from ditfastattn.errors import ConfigError
from ditfastattn.passes.plan import CfgLayout, Plan, Sampler
from ditfastattn.runtime.calibration import Progress
from ditfastattn.runtime.guidance import detect_cfg_layout
from ditfastattn.runtime.matching import scheduler_config
from ditfastattn.runtime.options import DEFAULT_THRESHOLD, BackendOptions
from ditfastattn.runtime.planned import PlannedFunction


def calibrate(
    pipeline: Any,
    call: Mapping[str, Any],
    *,
    threshold: float = DEFAULT_THRESHOLD,
    cfg_layout: CfgLayout | None = None,
    seed: int = 0,
    timestep: str = "timestep",
    on_progress: Callable[[Progress], None] | None = None,
) -> Plan:
    """Run one generation of ``pipeline`` and return the plan found (DiTFastAttn, Algorithm 1).

    Args:
        pipeline: a diffusers pipeline whose denoiser is ``pipeline.transformer``.
        call: the keyword arguments of the generation: prompts or classes, ``num_inference_steps``,
            ``guidance_scale``. They fix what the plan holds for.
        threshold: how much the model's output may change; the paper uses 0.025 (D1) to 0.15 (D6).
        cfg_layout: the order of the guidance halves; found by observation where None.
        seed: seeds the generation; the same seed gives the same plan, bit for bit.
        timestep: the name of the transformer's timestep argument.
        on_progress: told after each candidate how far the search is.

    Raises:
        ConfigError: the pipeline has no transformer, or calls it in a way no plan can describe.
    """
    transformer = getattr(pipeline, "transformer", None)
    if not isinstance(transformer, torch.nn.Module):
        raise ConfigError(
            "the pipeline has no transformer to calibrate",
            where="calibrate(pipeline)",
            got=type(pipeline).__name__,
            expected="a diffusers pipeline with a `transformer` module",
        )
    if threshold <= 0:
        raise ConfigError(
            "the threshold must be positive", where="calibrate(threshold)", got=threshold
        )
    layout = detect_cfg_layout(pipeline, call) if cfg_layout is None else cfg_layout
    steps = int(_argument(pipeline, call, "num_inference_steps") or 0)
    options = BackendOptions(
        threshold=threshold,
        cfg_layout=layout,
        steps=steps,
        timestep=timestep,
        on_progress=on_progress or _ignore,
    )
    functions = _run(pipeline, transformer, {**call, "generator": _seeded(seed)}, options)
    return _finish(functions, pipeline, call, layout, seed)


@contextmanager
def _compiled(pipeline: Any, transformer: torch.nn.Module, backend: Any) -> Generator[None]:
    plain = getattr(transformer, "_orig_mod", transformer)  # it may be compiled already
    pipeline.transformer = torch.compile(plain, backend=backend, fullgraph=True, dynamic=False)
    try:
        yield
    finally:
        pipeline.transformer = transformer


def _run(
    pipeline: Any, transformer: torch.nn.Module, call: dict[str, Any], options: BackendOptions
) -> list[PlannedFunction]:
    functions: list[PlannedFunction] = []

    def backend(module: GraphModule, _inputs: Sequence[Any]) -> PlannedFunction:
        functions.append(PlannedFunction(module, options))
        return functions[-1]

    with _compiled(pipeline, transformer, backend), torch.no_grad():
        pipeline(**call)
    return functions


def _finish(
    functions: Sequence[PlannedFunction],
    pipeline: Any,
    call: Mapping[str, Any],
    layout: CfgLayout,
    seed: int,
) -> Plan:
    found = [item for function in functions for item in function.specializations]
    if len(found) != 1:
        raise ConfigError(
            "a generation must call one graph of the transformer, at one shape",
            where="calibrate(pipeline)",
            got=f"{len(found)} graphs",
            remedy="keep batch, resolution and prompt length fixed during a generation",
        )
    generation = found[0].calibrating()
    sampler = Sampler(
        scheduler=type(pipeline.scheduler).__name__,
        config=scheduler_config(pipeline.scheduler),
        steps=len(generation.timesteps),
        timesteps=tuple(generation.timesteps),
        guidance_scale=_argument(pipeline, call, "guidance_scale"),
        cfg_layout=layout,
    )
    return found[0].finish(generation, sampler, seed)


def _argument(pipeline: Any, call: Mapping[str, Any], name: str) -> Any:
    """Return what the pipeline takes for ``name``: the caller's value or its default."""
    if name in call:
        return call[name]
    parameter = inspect.signature(pipeline.__call__).parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _ignore(_progress: Progress) -> None:
    pass
