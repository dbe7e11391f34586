"""Measure what it takes to capture and rewrite models of published sizes; nothing is computed.

    python -m ditfastattn.tools.benchmark_sizes run --out benchmarks/sizes

The models are on torch's meta device, which holds shapes and no weights, so that any size fits. A
plan of random strategies is unrolled, each of its distinct steps rewritten and outlined. Seconds
are the CPU's, in a process for each model. Each is measured again with half its layers: stages
that are linear in the layers take half as long.
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
from ditfastattn.passes.analysis.sites import find_sites
from ditfastattn.passes.graph.ir import value
from ditfastattn.passes.graph.outline import outline
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.step_program import StepProgram, unroll
from ditfastattn.passes.rewrites.pipeline import rewrite
from ditfastattn.passes.windows.lower_windows import lower_windows
from ditfastattn.tools.bench.random_models import ARCHITECTURES, Architecture, RandomPipeline
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
) -> None:
    """Measure each model, and the same with half its layers."""
    found = {
        name: {
            part: run_alone("benchmark_sizes", "one", name, str(steps), str(variants), *option)
            for part, option in (("whole", ()), ("half", ("--half",)))
        }
        for name in models.split(";")
    }
    arguments = {"models": models, "steps": steps, "variants": variants}
    data = {"machine": machine(), "arguments": arguments, "models": found}
    write_text_atomically(out / "sizes.json", json.dumps(data, indent=1) + "\n")
    open_console().print(_table(found))


@app.command(hidden=True)
def one(name: str, steps: int, variants: int, half: bool = False) -> None:
    """Print what a model takes, in this process."""
    architecture = ARCHITECTURES[name]()
    if half:
        config = dict(architecture.config)
        for key in _LAYERS:
            if key in config:
                config[key] //= 2
        architecture = replace(architecture, config=config)
    print(json.dumps(measure(architecture, steps, variants)))


def measure(architecture: Architecture, steps: int, variants: int) -> dict[str, Any]:
    """Return the CPU's seconds of each stage, and the sizes of what it makes."""
    _captured(ARCHITECTURES["dit-tiny"]())  # what the first capture of a process imports
    torch._dynamo.reset()
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = work()
        seconds[stage] = seconds.get(stage, 0.0) + time.process_time() - began
        return result

    captured: CapturedCall = timed("capture", lambda: _captured(architecture))
    report = timed("find sites", lambda: find_sites(captured.graph))
    sites = [
        replace(site, window=site.windows[0]) if site.windows else site for site in report.sites
    ]
    layout = CfgLayout.COND_FIRST if architecture.guided else CfgLayout.NONE
    if not architecture.guided:
        sites = [replace(site, no_shared_guidance="there is no guidance") for site in sites]
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


def _captured(architecture: Architecture) -> CapturedCall:
    device, dtype = torch.device("meta"), torch.bfloat16
    with device:
        transformer = architecture.make(**architecture.config).eval().to(dtype)
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
    table = Table(title="CPU seconds, whole (with half the layers)")
    stages = list(next(iter(found.values()))["whole"]["seconds"])
    for column in ("model", *stages, "regions", "caches, GiB"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, parts in found.items():
        whole, half = parts["whole"], parts["half"]
        table.add_row(
            name,
            *(f"{whole['seconds'][s]:.1f} ({half['seconds'][s]:.1f})" for s in stages),
            f"{whole['distinct_regions']} ({half['distinct_regions']})",
            f"{whole['cache_bytes'] / 2**30:.2f}",
        )
    return table


if __name__ == "__main__":
    app()
