"""Compare the runtimes of one plan in one table: speed, cold start, size on disk, peak memory.

python -m ditfastattn.tools.benchmark_runtimes run --out benchmarks/export

Speed is paired with the compiled dense model, all of them warm and in turns. A cold start is the
wall time of a process of its own, from its launch to its first image: imports, loading, and what is
compiled on the way. The first such process finds nothing compiled; the later ones find what it
left. Peak memory is that of these later processes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

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
from ditfastattn.runtime.search.measure.timing import measure_turns
from ditfastattn.tools.benchmarking.process import run_alone
from ditfastattn.tools.commands.generation import open_pipeline
from ditfastattn.tools.measure import machine, process_memory
from ditfastattn.tools.terminal import open_console

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
DENSE, PLANNED = "torch, dense", "torch, planned"
BUNDLES = {"onnxruntime": "onnx", "openvino": "openvino", ".pt2": "aoti"}  # runtimes, as for `load`
RUNTIMES = (DENSE, PLANNED, *BUNDLES)
_CACHE = "TORCHINDUCTOR_CACHE_DIR"


@dataclass(frozen=True)
class Subject:
    """What every runtime generates: a pipeline by a plan, and where its bundles are."""

    pipeline: str
    plan: Path
    label: int
    lowering: Lowering
    root: Path

    @property
    def call(self) -> dict[str, Any]:
        """Return the arguments of a generation."""
        steps = Plan.load(self.plan).sampler.steps
        return {"class_labels": [self.label], "num_inference_steps": steps, "guidance_scale": 2.0}

    def bundle(self, runtime: str) -> Path:
        """Return the folder of the bundle that ``runtime`` runs."""
        return self.root / ("packages" if runtime == ".pt2" else "graphs")

    def contender(self, runtime: str, pipeline: Any) -> Contender:
        """Return what generates by ``runtime``."""
        prompts = [Prompt(self.call, 0)]
        if runtime in BUNDLES:
            bundle = ditfastattn.load(self.bundle(runtime), runtime=BUNDLES[runtime])
            return Contender(pipeline, bundle, prompts)
        if runtime == DENSE:
            return dense_contender(pipeline, prompts, self.lowering)
        return planned_contender(pipeline, Plan.load(self.plan), prompts, self.lowering)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder for the JSON.")] = Path("benchmarks/export"),
    plan: Annotated[Path, typer.Option(help="A plan of the pipeline.")] = Path(
        "benchmarks/demo/plan.json"
    ),
    pipeline: Annotated[str, typer.Option(help="A folder; default: the embedded model.")] = "",
    label: Annotated[int, typer.Option(help="The class to generate.")] = 3,
    only: Annotated[str, typer.Option(help="Runtimes to compare, ';' between.")] = "",
    repetitions: Annotated[int, typer.Option(min=1, help="Timed generations of each.")] = 10,
    starts: Annotated[int, typer.Option(help="Later processes of each; 0: no cold starts.")] = 3,
    lowering: Annotated[Lowering, typer.Option(help="Of torch.")] = Lowering.INDUCTOR,
) -> None:
    """Export one plan in each format; measure every runtime beside the compiled dense model."""
    wanted = [name.strip() for name in only.split(";")] if only else list(RUNTIMES)
    absent = {name: reason for name in wanted if (reason := _why_absent(name))}
    chosen = [name for name in RUNTIMES if name in wanted and name not in absent]
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(pipeline, plan.absolute(), label, lowering, Path(folder))
        opened = open_pipeline(pipeline)
        seconds = _export(subject, opened, chosen)
        torch._dynamo.reset()
        speed, apart = _speed(subject, opened, chosen, repetitions)
        begun = {name: _starts(subject, name, starts) for name in chosen} if starts else {}
        rows = {
            name: {
                "speed": speed.get(name),
                "image": apart[name],
                "export_seconds": seconds.get(name, 0.0),
                "disk_bytes": _bytes(subject, opened, name),
                **begun.get(name, {}),
            }
            for name in chosen
        }
    data = {
        "machine": machine(),
        "arguments": {
            "plan": str(plan),
            "pipeline": pipeline,
            "repetitions": repetitions,
            "starts": starts,
            "lowering": str(lowering),
        },
        "runtimes": rows,
        "absent": absent,
    }
    write_text_atomically(out / "runtimes.json", json.dumps(data, indent=1) + "\n")
    open_console().print(table_text(rows))


@app.command(hidden=True)
def start(
    runtime: str, root: Path, plan: Path, pipeline: str, label: int, lowering: Lowering
) -> None:
    """Generate the first image of a process, and say how much memory that took at most."""
    subject = Subject(pipeline, plan, label, lowering, root)
    opened = open_pipeline(pipeline)
    with many_compilations():
        subject.contender(runtime, opened).generate(0)
    print(json.dumps({"peak_bytes": process_memory("VmHWM")}), flush=True)
    os._exit(0)  # the end of a process is not a part of its start


def table_text(rows: dict[str, dict[str, Any]]) -> str:
    """Return the table in Markdown; what was not measured is a dash."""

    def shown(number: float | None, scale: float, unit: str) -> str:
        return "-" if number is None else f"{number / scale:.2f} {unit}"

    lines = [
        "| runtime | speed | first start | later start | on disk | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        speed = (row.get("speed") or {}).get("speedup", {}).get("median")
        cells = (
            "1.00x" if name == DENSE else shown(speed, 1.0, "x").replace(" ", ""),
            shown(row.get("first_start_seconds"), 1.0, "s"),
            shown(row.get("later_start_seconds"), 1.0, "s"),
            shown(row.get("disk_bytes"), 2**20, "MiB"),
            shown(row.get("peak_bytes"), 2**20, "MiB"),
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _why_absent(runtime: str) -> str:
    if runtime not in RUNTIMES:
        return f"expected one of: {'; '.join(RUNTIMES)}"
    if runtime == "openvino" and importlib.util.find_spec("openvino") is None:
        return "openvino is not installed"
    return ""


def _export(subject: Subject, pipeline: Any, chosen: Sequence[str]) -> dict[str, float]:
    """Write the bundles that the runtimes need, each format once; return the seconds."""
    found: dict[str, float] = {}
    for name in chosen:
        folder, written = subject.bundle(name), "pt2" if name == ".pt2" else "onnx"
        if name not in BUNDLES or folder.exists():
            continue
        began = time.perf_counter()
        plan, call = Plan.load(subject.plan), subject.call
        ditfastattn.export(pipeline, call, plan, folder, format=written, golden=False)
        found[name] = time.perf_counter() - began
    return found


def _speed(
    subject: Subject, pipeline: Any, chosen: Sequence[str], repetitions: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """Time each runtime against the dense model, and see how far its image is from torch's."""
    names = [DENSE, PLANNED, *(name for name in chosen if name in BUNDLES)]
    with many_compilations():
        contenders = {name: subject.contender(name, pipeline) for name in names}
        for contender in contenders.values():
            contender.warm_up()
        dense, *others = (contender.generate for contender in contenders.values())
        timings = measure_turns(dense, others, repetitions)
    planned = contenders[PLANNED].images[0]
    apart = {
        name: float((each.images[0] - planned).abs().max()) for name, each in contenders.items()
    }
    torch._dynamo.reset()
    return {name: asdict(each) for name, each in zip(names[1:], timings, strict=True)}, apart


def _starts(subject: Subject, runtime: str, later: int) -> dict[str, float]:
    """Start processes one after the other; compiled code is kept in a folder of their own."""
    arguments = ["start", runtime, str(subject.root), str(subject.plan), subject.pipeline]
    arguments += [str(subject.label), subject.lowering.value]
    # Inductor's commands do not quote its folder.
    cache = subject.root / "-".join(["compiled", *re.findall(r"\w+", runtime)])
    seconds: list[float] = []
    peaks: list[int] = []
    for _ in range(1 + later):
        began = time.perf_counter()
        said = run_alone("benchmark_runtimes", *arguments, **{_CACHE: str(cache)})
        seconds.append(time.perf_counter() - began)
        peaks.append(said["peak_bytes"])
    return {
        "first_start_seconds": seconds[0],
        "later_start_seconds": statistics.median(seconds[1:]),
        "first_peak_bytes": peaks[0],
        "peak_bytes": statistics.median(peaks[1:]),
        "compiled_bytes": _size(cache) if runtime not in BUNDLES else 0,
    }


def _bytes(subject: Subject, pipeline: Any, runtime: str) -> int:
    """Return what a runtime needs on disk: a bundle, or the transformer's weights."""
    if runtime in BUNDLES:
        return _size(subject.bundle(runtime))
    state = pipeline.transformer.state_dict().values()
    return sum(tensor.nbytes for tensor in state)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    app()
