"""Measure bundles run by ONNX Runtime: speed against a dense bundle, size, and memory.

python -m ditfastattn.tools.benchmark_export run --out benchmarks/export
python -m ditfastattn.tools.benchmark_export memory --out benchmarks/export
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import onnx  # noqa: F401  # before memory is measured: a bundle's does not include it
import onnxruntime  # type: ignore[import-untyped]  # it has no annotations
import torch
import typer

import ditfastattn
from ditfastattn.core.files import write_text_atomically
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.lowering import Lowering, many_compilations
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search.measure.contender import (
    Contender,
    dense_contender,
    planned_contender,
)
from ditfastattn.runtime.search.measure.timing import PairedTiming, measure_turns
from ditfastattn.tools.bench.models import DIGITS
from ditfastattn.tools.benchmarking.plans import four_variants, make_pipeline, make_plan
from ditfastattn.tools.benchmarking.process import run_alone
from ditfastattn.tools.measure import machine, process_memory, trim_memory
from ditfastattn.tools.terminal import open_console

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
_WEIGHED = 3


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder for the JSON.")] = Path("benchmarks/export"),
    plan: Annotated[Path, typer.Option(help="A plan of the demo.")] = Path(
        "benchmarks/demo/plan.json"
    ),
    repetitions: Annotated[int, typer.Option(min=10, help="Timed generations of each.")] = 10,
) -> None:
    """Export the demo dense, by a plan and with four variants; measure speed and size."""
    loaded = Plan.load(plan)
    pipeline = DIGITS.open()
    call = {**DIGITS.call(3), "num_inference_steps": loaded.sampler.steps}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        plans = {"dense": None, "planned": loaded, "four variants": four_variants(pipeline, call)}
        bundles = {
            name: _exported(pipeline, call, made, root / name) for name, made in plans.items()
        }
        deep = _deep(root / "deep")
        speed = _speed(pipeline, call, loaded, root, repetitions)
    data = {
        "machine": {**machine(), "onnxruntime": onnxruntime.__version__},
        "arguments": {"plan": str(plan), "repetitions": repetitions},
        "bundles": bundles,
        "28 layers, 20 steps": deep,
        "speed": {name: asdict(timing) for name, timing in speed.items()},
    }
    write_text_atomically(out / "export.json", json.dumps(data, indent=1) + "\n")
    medians = {name: timing.speedup.median for name, timing in speed.items()}
    shown = {"bundles": bundles, "deep": deep, "speedup": medians}
    open_console().print_json(data=shown)


@app.command()
def memory(
    out: Annotated[Path, typer.Option(help="Folder for the JSON.")] = Path("benchmarks/export"),
    plan: Annotated[Path, typer.Option(help="A plan of the demo.")] = Path(
        "benchmarks/demo/plan.json"
    ),
) -> None:
    """Measure the memory of bundles when loaded and at their peak, each in its own process."""
    loaded = Plan.load(plan)
    pipeline = DIGITS.open()
    call = {**DIGITS.call(3), "num_inference_steps": loaded.sampler.steps}
    plans = {"dense": None, "planned": loaded, "four variants": four_variants(pipeline, call)}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, made in plans.items():
            _exported(pipeline, call, made, root / name)
        found = {
            f"{name}{', low memory' if low else ''}": _alone(root / name, low)
            for name in plans
            for low in (False, True)
        }
    data = {
        "machine": {**machine(), "onnxruntime": onnxruntime.__version__},
        "arguments": {"plan": str(plan), "processes": _WEIGHED},
        "memory": found,
    }
    write_text_atomically(out / "memory.json", json.dumps(data, indent=1) + "\n")
    open_console().print_json(data=found)


def _exported(
    pipeline: Any, call: Mapping[str, Any], plan: Plan | None, folder: Path
) -> dict[str, Any]:
    began = time.perf_counter()
    manifest = ditfastattn.export(pipeline, call, plan, folder, loop=plan is not None)
    sizes = {name: spec.bytes for name, spec in manifest.files.items()}
    loop = sizes.pop("loop.onnx", 0)
    return {
        "variants": len(manifest.variants),
        "bytes": sum(sizes.values()),
        "loop_bytes": loop,
        "seconds": time.perf_counter() - began,
    }


def _deep(folder: Path) -> dict[str, Any]:
    """Export a model of 28 layers with 20 distinct steps."""
    pipeline, prompt = (
        make_pipeline(28),
        Prompt({"class_labels": [3], "num_inference_steps": 20}, 0),
    )
    plan = make_plan(pipeline, prompt, 20)
    torch._dynamo.reset()
    return _exported(pipeline, prompt.call, plan, folder)


def _alone(folder: Path, low_memory: bool) -> dict[str, int]:
    """Return the memory that a bundle takes in its own process, the median of several."""
    option = ["--low-memory"] if low_memory else []
    found: list[dict[str, int]] = [
        run_alone("benchmark_export", "weigh", str(folder), *option) for _ in range(_WEIGHED)
    ]
    return {name: int(statistics.median(each[name] for each in found)) for name in found[0]}


@app.command(hidden=True)
def weigh(folder: Path, low_memory: bool = False) -> None:
    """Print the memory that a bundle takes: when loaded, and at the peak of a generation."""
    pipeline = DIGITS.open()
    call = {**DIGITS.call(3), "num_inference_steps": 20}
    trim_memory()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    before = process_memory()
    bundle = ditfastattn.load(folder, low_memory=low_memory)
    loaded = process_memory()
    Contender(pipeline, bundle, [Prompt(call, 0)]).warm_up()
    peak = process_memory("VmHWM")
    print(json.dumps({"loaded_bytes": loaded - before, "peak_bytes": peak - before}))


def _speed(
    pipeline: Any, call: Mapping[str, Any], plan: Plan, root: Path, repetitions: int
) -> dict[str, PairedTiming]:
    """Time planned against dense, in ONNX Runtime and in torch, all four in turns."""
    prompts = [Prompt(call, 0)]
    bundles = {name: ditfastattn.load(root / name) for name in ("dense", "planned")}
    with many_compilations():
        in_torch = [
            dense_contender(pipeline, prompts, Lowering.INDUCTOR),
            planned_contender(pipeline, plan, prompts, Lowering.INDUCTOR),
        ]
        contenders = [Contender(pipeline, bundle, prompts) for bundle in bundles.values()]
        for contender in [*contenders, *in_torch]:
            contender.warm_up()
            contender.warm_up()
    found: dict[str, PairedTiming] = {}
    for name, (dense, planned) in {"onnxruntime": contenders, "torch": in_torch}.items():
        (found[name],) = measure_turns(dense.generate, [planned.generate], repetitions)
    across = measure_turns(in_torch[1].generate, [contenders[1].generate], repetitions)[0]
    found["planned, onnxruntime over torch"] = across
    torch._dynamo.reset()
    return found


if __name__ == "__main__":
    app()
