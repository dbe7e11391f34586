"""Try the compiler on one tiny model: its sites, a mixed plan against the reference, export."""

from __future__ import annotations

import operator
import random
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditfastattn.core.errors import ConfigError
from ditfastattn.export.batch import FIX_BATCH
from ditfastattn.export.bundle import export_model
from ditfastattn.export.capture_call import CapturedCall, RecordedCall, capture_call
from ditfastattn.export.options import ExportOptions
from ditfastattn.passes.analysis.feed_forwards import closure, linear_calls
from ditfastattn.passes.analysis.fingerprint import fingerprint
from ditfastattn.passes.analysis.site import Site, SiteKind
from ditfastattn.passes.analysis.sites import SiteReport, find_sites
from ditfastattn.passes.graph.ir import VIEWS, aten, find
from ditfastattn.passes.plan.calibration import Calibration
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.legality import START, legal_strategies, why_not
from ditfastattn.passes.plan.planned_site import planned_site
from ditfastattn.passes.plan.schema import Plan, Sampler
from ditfastattn.passes.plan.strategies import Strategy, strategies
from ditfastattn.runtime.bundle.load import load
from ditfastattn.runtime.clock import read_timestep
from ditfastattn.runtime.exported import PlannedProgram
from ditfastattn.runtime.matching import input_shapes, static_tensors
from ditfastattn.runtime.options import parse_options
from ditfastattn.runtime.reference import PlanInterpreter
from ditfastattn.runtime.traced import TracedFunction
from ditfastattn.tools.zoo.base import ZooModel

_LINE = re.compile(r'File "(?:.*/)?([^/"]+/[^/"]+)", line (\d+), in (\w+)')
_PATH = re.compile(r"\S*/\S*?: ")
BATCH = 2  # both halves of guidance, one image
TOLERANCE = 1e-4  # of the largest output
HALF_TOLERANCE = 1e-2  # of a model that itself rounds to half precision
_HALF = (torch.bfloat16, torch.float16)
_AFFINE = {
    *(*VIEWS, aten.linear.default, aten.reshape.default, aten._unsafe_view.default),
    *(aten.flatten.using_ints, aten.contiguous.default, aten.clone.default, aten.to.dtype),
    *(aten.split_with_sizes.default, aten.chunk.default, operator.getitem, aten.squeeze.dim),
}


@dataclass(frozen=True)
class Trial:
    """What the compiler made of one model.

    ``error`` is the largest difference between a mixed plan's outputs and the plan interpreter's,
    relative to the largest output. ``program_error`` is the same for the plan over the graph of
    torch.export, ``onnx_error`` for the exported bundle; ``no_program`` and ``no_onnx`` say why
    there is none, ``fixed_batch`` why the bundle takes one batch alone. ``guards`` and ``opaque``
    say what a traced graph holds for, and which modules are called as they are, with the reasons.
    """

    name: str
    report: SiteReport
    rows: tuple[tuple[Strategy, ...], ...]
    error: float
    program_error: float | None = None
    no_program: str = ""
    onnx_error: float | None = None
    no_onnx: str = ""
    fixed_batch: str = ""
    guards: tuple[str, ...] = ()
    opaque: Mapping[str, str] = field(default_factory=dict)
    plan: Plan | None = None
    in_half: bool = False  # whether the model, in fp32, computes a part in half precision

    @property
    def kinds(self) -> Counter[SiteKind]:
        """Count the sites by kind."""
        return Counter(site.kind for site in self.report.sites)

    @property
    def legal(self) -> set[Strategy]:
        """Return the strategies that some attention may take."""
        sites = [site for site in self.report.sites if site.kind is not SiteKind.FEED_FORWARD]
        return {s for site in sites for s in strategies() if not why_not(s, site)}


def try_model(zoo: ZooModel, seed: int = 0, onnx: bool = False, program: bool = False) -> Trial:
    """Compile ``zoo`` by a random plan of every legal strategy and compare with the reference.

    With ``program`` it is also captured by torch.export, with ``onnx`` also exported to ONNX.

    Raises:
        Exception: Dynamo, or a pass, does not support the model.
    """
    torch._dynamo.reset()
    model = zoo.build(seed)
    calls = [zoo.call(BATCH, timestep) for timestep in zoo.timesteps]
    captured = capture_call(model, RecordedCall(calls[0]), zoo.argument)
    report = find_sites(captured.graph)
    if not report.sites:
        return Trial(zoo.name, report, (), 0.0)
    generator = random.Random(seed)
    seen = [
        replace(site, window=generator.choice(site.windows)) if site.windows else site
        for site in report.sites
        if site.ordinal >= 0  # the plan interpreter sees it
    ]
    timesteps = tuple(read_timestep(call[zoo.argument]).value() for call in calls)
    plan = mixed_plan(timesteps, captured, report.sites, seen, seed)
    whole = () if captured.traced is None else tuple(captured.traced.opaque)
    expected = reference(model, plan, seen, calls, whole)
    options: dict[str, Any] = {"plan": plan, "lowering": "eager", "timestep": zoo.argument}
    run = _planned(model, options, captured.traced is not None)
    with torch.no_grad():
        found = [first_tensor(run(**call)) for call in calls]
    error = relative_error(found, expected)
    values = [node.meta.get("val") for node in captured.graph.module.graph.nodes]
    half = any(isinstance(item, Tensor) and item.dtype in _HALF for item in values)
    trial = Trial(zoo.name, report, plan.strategies, error, plan=plan, in_half=half)
    if captured.traced is not None:
        reads = captured.traced.guards.reads
        trial = replace(trial, guards=tuple(map(str, reads)), opaque=captured.traced.opaque)
    if program:
        trial = _by_torch_export(trial, zoo, model, plan, expected)
    return _exported(trial, zoo, model, plan, expected) if onnx else trial


def _planned(model: nn.Module, options: dict[str, Any], traced: bool) -> Any:
    """Return what runs ``model`` by the plan of ``options``: compiled, or traced."""
    if not traced:
        return torch.compile(model, backend="ditfastattn", fullgraph=True, options=options)
    function = TracedFunction(model, parse_options(options, None))
    return lambda **call: function(model.forward, (), call)


def count_graph_breaks(zoo: ZooModel, seed: int = 0) -> int:
    """Return the number of graph breaks of one call if Dynamo may break graphs; -1: no graph.

    Raises:
        Exception: Dynamo, or the model, fails.
    """
    torch._dynamo.reset()
    model = zoo.build(seed)
    with torch.no_grad():
        found = torch._dynamo.explain(model)(**zoo.call(BATCH, zoo.timesteps[0]))
    return int(found.graph_break_count)


def _by_torch_export(
    trial: Trial, zoo: ZooModel, model: nn.Module, plan: Plan, expected: Sequence[Tensor]
) -> Trial:
    """Run ``plan`` over the graph of torch.export, which must have the same sites."""
    calls = [zoo.call(BATCH, timestep) for timestep in zoo.timesteps]
    try:
        with torch.no_grad():
            program = torch.export.export(model, (), calls[0])
    except Exception as error:  # a survey reports every failure
        return replace(trial, no_program=f"torch makes no program of it: {reason_of(error)}")
    try:
        planned = PlannedProgram(program, plan, lowering="eager", timestep=zoo.argument)
        if differing := _differing(planned.sites, trial.report):
            return replace(trial, no_program=f"other sites: {differing}")
        with torch.no_grad():
            found = [first_tensor(planned(**call)) for call in calls]
        return replace(trial, program_error=relative_error(found, expected))
    except Exception as error:  # a survey reports every failure
        return replace(trial, no_program=reason_of(error))


def _differing(found: SiteReport, wanted: SiteReport) -> str:
    """Name the sites that differ between two captures."""
    pairs = zip_longest(map(_seen, found.sites), map(_seen, wanted.sites))
    return "; ".join(f"{one} for {other}" for one, other in pairs if one != other)


def _seen(site: Site) -> tuple[object, ...]:
    """Return what both captures must agree on: everything but the names of nodes."""
    return (
        *(planned_site(site), site.ordinal, len(site.exits), site.grid, site.windows, site.text),
        *(site.no_window, site.no_shared_guidance),
    )


def _exported(
    trial: Trial, zoo: ZooModel, model: nn.Module, plan: Plan, expected: Sequence[Tensor]
) -> Trial:
    calls = [zoo.call(BATCH, timestep) for timestep in zoo.timesteps]
    reasons: list[str] = []
    for free in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            try:
                options = ExportOptions(timestep=zoo.argument, dynamic_batch=free)
                export_model(model, RecordedCall(calls[0]), plan, Path(folder) / "bundle", options)
                bundle = load(Path(folder) / "bundle")
                error = relative_error([first_tensor(bundle(**call)) for call in calls], expected)
                return replace(trial, onnx_error=error, fixed_batch="".join(reasons))
            except Exception as found:  # a survey reports every failure
                reasons.append(reason_of(found))
                if FIX_BATCH not in str(found):
                    break
    return replace(trial, no_onnx=reasons[-1])


def mixed_plan(
    timesteps: tuple[float, ...],
    captured: CapturedCall,
    every: Sequence[Site],
    sites: Sequence[Site],
    seed: int,
) -> Plan:
    """Return a plan over ``sites`` of ``every`` in which each legal strategy may occur."""
    static = static_tensors(captured.graph, captured.tensors)
    rows = mixed_strategies(sites, seed, len(timesteps), _not_affine(captured, sites))
    return Plan(
        model=fingerprint(captured.graph, every, static),
        inputs=input_shapes(captured.graph),
        sampler=Sampler(steps=len(rows), timesteps=timesteps, cfg_layout=CfgLayout.COND_FIRST),
        sites=tuple(planned_site(site) for site in sites),
        strategies=tuple(rows),
        calibration=Calibration(method="manual"),
    )


def _not_affine(captured: CapturedCall, sites: Sequence[Site]) -> frozenset[str]:
    """Return the sites whose outputs pass something that is not affine, such as a norm.

    The graph extrapolates behind it and the interpreter before it, so they differ.
    """
    graph = captured.graph.module.graph
    positions = [i for i, entry in enumerate(captured.graph.inputs) if entry.static]
    inputs = graph.find_nodes(op="placeholder")
    static = {inputs[position] for position in positions}
    linears = {call: node for node, call in linear_calls(captured.graph).items()}
    found: set[str] = set()
    for site in sites:
        start = find(graph, site.node)
        if site.kind is SiteKind.FEED_FORWARD:  # its last linear
            start = linears[site.weight, site.ordinal]
        inside = closure(graph, [start], static.__contains__) - {start}
        if any(node.target not in _AFFINE for node in inside):
            found.add(site.name)
    return frozenset(found)


def mixed_strategies(
    sites: Sequence[Site],
    seed: int,
    steps: int,
    not_affine: frozenset[str] = frozenset(),
    layout: CfgLayout = CfgLayout.COND_FIRST,
) -> list[tuple[Strategy, ...]]:
    """Return a random legal schedule in which every legal strategy of every site may occur.

    The sites ``not_affine`` do not extrapolate.
    """
    generator = random.Random(seed)
    histories = [START.after(Strategy.FULL)] * len(sites)
    rows: list[tuple[Strategy, ...]] = [tuple(Strategy.FULL for _ in sites)]
    while len(rows) < steps:
        row: list[Strategy] = []
        for index, site in enumerate(sites):
            legal = [
                strategy
                for strategy in legal_strategies(site, layout, histories[index])
                if not (strategy.extrapolates and site.name in not_affine)
            ]
            row.append(generator.choice(legal))
            histories[index] = histories[index].after(row[-1])
        rows.append(tuple(row))
    return rows


def reference(
    model: nn.Module,
    plan: Plan,
    sites: Sequence[Site],
    calls: Sequence[dict[str, Any]],
    whole: Sequence[str] = (),
) -> list[Tensor]:
    """Return the plan interpreter's outputs; it does not look into the modules ``whole``."""
    interpreter = PlanInterpreter(model, plan.strategies, sites, plan.sampler.cfg_layout)
    results: list[Tensor] = []
    for step, call in enumerate(calls):
        parts = map(model.get_submodule, whole)
        uncompiled = torch.compiler.set_stance("force_eager")  # Dynamo looks into no such mode
        with torch.no_grad(), uncompiled, interpreter.outside(parts), interpreter.step(step):
            results.append(first_tensor(model(**call)))
    return results


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference over the largest magnitude, over all steps."""
    largest = max(float(item.abs().max()) for item in expected)
    pairs = zip(found, expected, strict=True)
    return max(float((one - other).abs().max()) for one, other in pairs) / largest


def reason_of(error: BaseException) -> str:
    """Return what an exception says, as one line without the paths of files.

    Of a ``ConfigError`` that is all but the remedy; of a stack trace it is the innermost line.
    """
    if isinstance(error, ConfigError):
        lines = _LINE.findall(error.where)
        where = "{}:{} in {}".format(*lines[-1]) if lines else error.where
        pairs = (("at", where), ("got", error.got), ("expected", error.expected))
        details = ", ".join(f"{name} {said}" for name, said in pairs if said)
        return " ".join(f"{error.what} ({details})".split()) if details else error.what
    first = str(error).strip().partition("\n\n")[0]
    message = _PATH.sub("", " ".join(first.split()))
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        message = f"a size or a branch depends on what an input holds: {message}"
    return message or type(error).__name__


def first_tensor(result: Any) -> Tensor:
    """Return the denoised tensor of what a model returns."""
    while not isinstance(result, Tensor):
        result = result[0]
    return result
