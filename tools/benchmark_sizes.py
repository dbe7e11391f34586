"""Measure what it takes to capture, rewrite and compile models of published sizes.

    python -m ditfastattn.tools.benchmark_sizes run --out benchmarks/sizes
    python -m ditfastattn.tools.benchmark_sizes compile --out benchmarks/sizes

Nothing is computed. ``run`` has the models on torch's meta device, which holds shapes and no
weights, so that any size fits. A plan of random strategies is unrolled, each of its distinct steps
rewritten and outlined. Seconds are the CPU's, in a process for each model. Each is measured again
with half its layers, and with half the steps: stages that are linear in them take half as long.

``compile`` has Inductor compile the plan's distinct regions, and the dense model as one graph, for
this CPU. Its weights are memory that is never touched, and its token counts are the published ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from ditfastattn.core.files import write_text_atomically
from ditfastattn.export.capture_call import CapturedCall, RecordedCall, capture_call
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.analysis.sites import SiteReport, find_sites
from ditfastattn.passes.graph.ir import clone, value
from ditfastattn.passes.graph.outline import outline
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.step_program import StepProgram, unroll
from ditfastattn.passes.rewrites.pipeline import rewrite
from ditfastattn.passes.windows.lower_windows import lower_windows
from ditfastattn.runtime.lowering import Lowering, compiled_regions, lower
from ditfastattn.tools.bench.random_models import ARCHITECTURES, Architecture, RandomPipeline
from ditfastattn.tools.benchmarking.compiling import cpu_seconds, run_uncached, start_inductor
from ditfastattn.tools.benchmarking.plans import make_rows
from ditfastattn.tools.benchmarking.process import run_alone
from ditfastattn.tools.measure import machine, process_memory
from ditfastattn.tools.terminal import open_console

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
DEFAULT = "dit-xl-512;pixart-sigma-1k;sd3;flux"
_LAYERS = ("num_layers", "num_single_layers")


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder for the JSON.")] = Path("benchmarks/sizes"),
    models: Annotated[str, typer.Option(help="Their names, ';' between.")] = DEFAULT,
    steps: Annotated[int, typer.Option(min=4, help="Sampler steps.")] = 50,
    variants: Annotated[int, typer.Option(min=2, help="Distinct steps of the plan.")] = 8,
    note: Annotated[str, typer.Option(help="What else ran on the machine, to record.")] = "",
) -> None:
    """Measure each model, the same with half its layers, and with half the steps."""
    parts = {"whole": (steps, ()), "half": (steps, ("--half",)), "half the steps": (steps // 2, ())}
    found = {
        name: {
            part: run_alone("benchmark_sizes", "one", name, str(count), str(variants), *option)
            for part, (count, option) in parts.items()
        }
        for name in models.split(";")
    }
    arguments = {"models": models, "steps": steps, "variants": variants, "note": note}
    data = {"machine": machine(), "arguments": arguments, "models": found}
    write_text_atomically(out / "sizes.json", json.dumps(data, indent=1) + "\n")
    open_console().print(_table(found))


@app.command(hidden=True)
def one(name: str, steps: int, variants: int, half: bool = False) -> None:
    """Print what a model takes, in this process."""
    print(json.dumps(measure(_architecture(name, half), steps, variants)))


@app.command("compile")
def compile_(
    out: Annotated[Path, typer.Option(help="Folder for the JSON.")] = Path("benchmarks/sizes"),
    model: Annotated[str, typer.Option(help="Its name.")] = "dit-xl-512",
    steps: Annotated[int, typer.Option(min=4, help="Sampler steps.")] = 50,
    variants: Annotated[int, typer.Option(min=2, help="Distinct steps of the plan.")] = 8,
    note: Annotated[str, typer.Option(help="What else ran on the machine, to record.")] = "",
) -> None:
    """Time compiling a plan's steps, and the dense model, whole and with half its layers."""
    options = {"whole": (), "half": ("--half",)}
    results = {
        part: {
            kind: run_uncached("benchmark_sizes", "compiled", model, str(steps), count, *option)
            for kind, count in (("dense", "1"), ("plan", str(variants)))
        }
        for part, option in options.items()
    }
    arguments = {"model": model, "steps": steps, "variants": variants, "note": note}
    data = {"machine": machine(), "arguments": arguments, "results": results}
    write_text_atomically(out / "compile.json", json.dumps(data, indent=1) + "\n")
    open_console().print_json(data=results)


@app.command(hidden=True)
def compiled(name: str, steps: int, variants: int, half: bool = False) -> None:
    """Print what compiling a model takes, in this process: dense where ``variants`` is 1."""
    print(json.dumps(measure_compiling(_architecture(name, half), steps, variants)))


def _architecture(name: str, half: bool) -> Architecture:
    """Return a model of published size, or what has half its layers."""
    architecture = ARCHITECTURES[name]()
    if not half:
        return architecture
    halves = {key: size // 2 for key, size in architecture.config.items() if key in _LAYERS}
    return replace(architecture, config={**architecture.config, **halves})


def measure(architecture: Architecture, steps: int, variants: int) -> dict[str, Any]:
    """Return the CPU's seconds of each stage, and the sizes of what it makes."""
    meta = torch.device("meta")
    _captured(ARCHITECTURES["dit-tiny"](), meta)  # what the first capture of a process imports
    torch._dynamo.reset()
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = work()
        seconds[stage] = seconds.get(stage, 0.0) + time.process_time() - began
        return result

    captured: CapturedCall = timed("capture", lambda: _captured(architecture, meta))
    report = timed("find sites", lambda: find_sites(captured.graph))
    sites, layout = _windowed(architecture, report)
    rows = make_rows(sites, steps, variants)
    program: StepProgram = timed("unroll", lambda: unroll(rows, captured.graph, sites, True))
    regions, distinct = 0, set()
    for actions in program.variants:
        module = timed("rewrite", partial(rewrite, captured.graph, program.sites, actions, layout))
        lower_windows(module)
        inputs = [value(node) for node in module.graph.find_nodes(op="placeholder")]
        found = timed("outline", partial(outline, module, inputs))
        regions += len(found)
        distinct |= {region.key for region in found}
    return {
        "nodes": len(captured.graph.module.graph.nodes),
        "sites": len(sites),
        "declined": len(report.declined),
        "variants": len(program.variants),
        "regions": regions,
        "distinct_regions": len(distinct),
        "cache_bytes": program.slots.peak_bytes,
        "peak_process_bytes": process_memory("VmHWM"),
        "seconds": seconds,
    }


def measure_compiling(architecture: Architecture, steps: int, variants: int) -> dict[str, Any]:
    """Return what it takes to compile each distinct step; the dense one whole, if it is alone."""
    captured = _captured(architecture, torch.device("cpu"))
    sites, layout = _windowed(architecture, find_sites(captured.graph))
    start_inductor()
    began, before = time.perf_counter(), cpu_seconds()
    if variants == 1:
        modules = [clone(captured.graph.module)]
    else:
        rows = make_rows(sites, steps, variants)
        program = unroll(rows, captured.graph, sites, True)
        modules = [
            rewrite(captured.graph, program.sites, actions, layout) for actions in program.variants
        ]
    pairs = zip(captured.tensors, captured.graph.inputs, strict=True)
    kept = []  # regions are shared for as long as a step runs them
    for module in modules:
        inputs = [value(node) for node in module.graph.find_nodes(op="placeholder")]
        kept.append(lower(module, inputs, Lowering.INDUCTOR, {}, outlined=variants > 1))
    return {
        "steps_compiled": len(kept),
        "distinct_regions": compiled_regions(),
        "seconds": time.perf_counter() - began,
        "cpu_seconds": cpu_seconds() - before,
        "parameters": sum(t.numel() for t, e in pairs if e.static),
        "peak_process_bytes": process_memory("VmHWM"),
    }


def _windowed(architecture: Architecture, report: SiteReport) -> tuple[list[Site], CfgLayout]:
    """Return the sites with their first windows, and how the model takes guidance."""
    sites = [
        replace(site, window=site.windows[0]) if site.windows else site for site in report.sites
    ]
    if architecture.guided:
        return sites, CfgLayout.COND_FIRST
    alone = "there is no guidance"
    return [replace(site, no_shared_guidance=alone) for site in sites], CfgLayout.NONE


def _captured(architecture: Architecture, device: torch.device) -> CapturedCall:
    """Capture one call of a model whose tensors have no content."""
    dtype = torch.bfloat16
    with torch.device("meta"):
        transformer = architecture.make(**architecture.config).eval().to(dtype)
    transformer = transformer.to_empty(device=device)
    with device:
        pipeline = RandomPipeline(transformer, None)
        pipeline.architecture = architecture
        images = 2 if architecture.guided else 1
        latents = torch.empty(images, *architecture.shape, dtype=dtype)
        call = {
            "hidden_states": latents,
            "timestep": torch.empty(images),
            **pipeline.conditions(images, None, device, dtype),
            "return_dict": False,
        }
    return capture_call(transformer, RecordedCall(call))


def _table(found: dict[str, Any]) -> Table:
    table = Table(title="CPU seconds, whole (with half the layers, with half the steps)")
    stages = list(next(iter(found.values()))["whole"]["seconds"])
    for column in ("model", *stages, "regions", "caches, GiB"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, parts in found.items():
        whole, half, fewer = parts["whole"], parts["half"], parts["half the steps"]
        each = [[part["seconds"][stage] for part in (whole, half, fewer)] for stage in stages]
        table.add_row(
            name,
            *(f"{a:.1f} ({b:.1f}, {c:.1f})" for a, b, c in each),
            f"{whole['distinct_regions']} ({half['distinct_regions']})",
            f"{whole['cache_bytes'] / 2**30:.2f}",
        )
    return table


if __name__ == "__main__":
    app()
