"""Export tiny models, and run single graphs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]  # it has no annotations
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from ditfastattn import CfgLayout, Plan, Strategy
from ditfastattn.export.bundle import export_model
from ditfastattn.export.capture_call import RecordedCall, capture_call, capture_doubled
from ditfastattn.export.linear_scheduler import linear_schedule
from ditfastattn.export.lint import findings
from ditfastattn.export.options import ExportOptions
from ditfastattn.export.step_graphs import Captures, used_inputs, variant_graph, write_graph
from ditfastattn.export.watch_sampler import with_guidance
from ditfastattn.export.weights import Weights
from ditfastattn.runtime.bundle.manifest import Manifest, read_manifest
from ditfastattn.runtime.bundle.stepping import Stepping
from tests.helpers import TinyModel, make_plan
from tests.shared import digest, made_once


def export_anew(
    tiny: TinyModel,
    rows: Sequence[Sequence[Strategy]] | None,
    out: Path,
    layout: CfgLayout = CfgLayout.COND_FIRST,
    options: ExportOptions | None = None,
) -> Manifest:
    """Export ``tiny`` with a plan of ``rows`` over all its sites, or dense."""
    plan = None if rows is None else make_plan(tiny, rows, layout, feed_forwards=True)
    return export_model(tiny.model, RecordedCall(tiny.call(0, 4)), plan, out, options)


def export_tiny(
    tiny: TinyModel,
    rows: Sequence[Sequence[Strategy]] | None,
    out: Path,
    layout: CfgLayout = CfgLayout.COND_FIRST,
    options: ExportOptions | None = None,
) -> Manifest:
    """Put into ``out`` what ``export_anew`` makes, which is made once a run: tests own a copy."""
    plan = None if rows is None else make_plan(tiny, rows, layout, feed_forwards=True)
    return export_once(tiny, plan, out, options)


def export_once(
    tiny: TinyModel,
    plan: Plan | None,
    out: Path,
    options: ExportOptions | None = None,
    stepping: Stepping | None = None,
) -> Manifest:
    """Put into ``out`` the bundle of a call of ``tiny``, made once a run: tests own a copy."""
    chosen, call = options or ExportOptions(), RecordedCall(tiny.call(0, 4))

    def make(folder: Path) -> None:
        export_model(tiny.model, call, plan, folder / "bundle", chosen, lambda _: stepping)

    asked = {**vars(chosen), "on_progress": None}
    key = digest([tiny.model, call.arguments, plan, asked, stepping])
    shutil.copytree(made_once("bundles", key, make) / "bundle", out, dirs_exist_ok=True)
    return read_manifest(out)


def ddim_stepping(tiny: TinyModel, plan: Plan) -> Stepping:
    """Return the steps of DDIM, for a plan of ``tiny``."""
    scheduler: Any = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(plan.sampler.steps)
    call = tiny.call(0, 4)
    with torch.no_grad():
        output = tiny.model(**call)[0]
    return with_guidance(linear_schedule(scheduler), plan, call["hidden_states"], output)


def write_module(
    module: nn.Module, arguments: Mapping[str, Any], folder: Path, fixed: bool = False
) -> tuple[Path, list[str]]:
    """Write ``module`` as one graph; return its path and the names of its inputs."""
    call = RecordedCall(arguments)
    torch._dynamo.reset()
    first = capture_call(module.eval(), call)
    second = first if fixed else capture_doubled(module, call)
    captures = Captures(first, second, (call.batch, 2 * call.batch), ((), ()))
    step = variant_graph(captures, (), CfgLayout.NONE, (), "module")
    weights = Weights(folder / "weights.bin", "weights.bin")
    model = write_graph(step, weights, "module")
    weights.close()
    path = folder / "module.onnx"
    path.write_bytes(model.SerializeToString())
    return path, [value.name for value in used_inputs(step)]


def run_graph(path: Path, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Run a graph by ONNX Runtime."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    results = session.run(None, {name: item.numpy() for name, item in inputs.items()})
    return [torch.from_numpy(result) for result in results]


def run_evaluator(path: Path, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Run a graph by ONNX's own evaluator."""
    evaluator = ReferenceEvaluator(str(path))
    results: Any = evaluator.run(None, {name: item.numpy() for name, item in inputs.items()})
    return [torch.from_numpy(np.array(result)) for result in results]


def assert_same(
    module: nn.Module,
    arguments: Mapping[str, Any],
    folder: Path,
    tolerance: float = 1e-5,
    fixed: bool = False,
    evaluator: bool = False,
) -> None:
    """Assert that the graph of ``module`` is sound and computes the same, at two batch sizes.

    With ``evaluator``, ONNX's own evaluator computes the same too.
    """
    path, names = write_module(module, arguments, folder, fixed)
    assert findings(path) == []
    for call in (RecordedCall(arguments), *(() if fixed else (RecordedCall(arguments).doubled(),))):
        with torch.no_grad():
            expected = module(**call.arguments)
        given = {name: call.arguments[name] for name in names}
        results = run_graph(path, given)
        wanted = expected if isinstance(expected, (tuple, list)) else [expected]
        if evaluator:
            results, wanted = [*results, *run_evaluator(path, given)], [*wanted, *wanted]
        for got, item in zip(results, wanted, strict=True):
            assert got.shape == item.shape
            assert got.dtype == item.dtype
            assert torch.allclose(got, item, atol=tolerance, rtol=tolerance)
