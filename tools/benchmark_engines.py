"""Build TensorRT engines in every layout, which needs no GPU; record sizes and seconds.

python -m ditfastattn.tools.benchmark_engines --out benchmarks/tensorrt
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import ditfastattn
from ditfastattn.core.files import write_text_atomically
from ditfastattn.runtime.tensorrt.engines import Engines, Layout
from ditfastattn.tools.bench.models import DIGITS
from ditfastattn.tools.benchmarking.plans import four_variants
from ditfastattn.tools.measure import machine
from ditfastattn.tools.terminal import open_console

app = typer.Typer(no_args_is_help=False, pretty_exceptions_enable=False)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder for the JSON.")] = Path("benchmarks/tensorrt"),
    target: Annotated[str, typer.Option(help="Compute capability.")] = "sm89",
) -> None:
    """Export the demo in fp16, dense and with four step variants; build it in all layouts."""
    pipeline = DIGITS.open()
    call = {**DIGITS.call(3), "num_inference_steps": 8}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        ditfastattn.export(pipeline, call, None, root / "dense", dtype="float16")
        torch._dynamo.reset()
        plan = four_variants(pipeline, call)
        torch._dynamo.reset()
        planned = ditfastattn.export(
            pipeline, call, plan, root / "planned", dtype="float16", loop=True
        )
        weights = planned.files[planned.weights].bytes
        built = ditfastattn.build(root / "dense", target=target)
        found["dense"] = _recorded(built, weights)
        for layout in (Layout.VARIANTS, Layout.SWITCH, Layout.LOOP):
            built = ditfastattn.build(root / "planned", target=target, layout=layout.value)
            found[layout.value] = _recorded(built, weights)
    data = {
        "machine": {**machine(), "tensorrt": f"{built.library} {built.version}"},
        "arguments": {"target": target, "steps": 8, "dtype": "float16"},
        "weights_bytes": weights,
        "layouts": found,
    }
    write_text_atomically(out / "engines.json", json.dumps(data, indent=1) + "\n")
    open_console().print_json(data=data)


def _recorded(engines: Engines, weights: int) -> dict[str, Any]:
    sizes = [spec.content.bytes for spec in engines.engines]
    return {
        "engines": len(sizes),
        "bytes": sum(sizes),
        "of_weights": sum(sizes) / weights,
        "seconds": sum(spec.seconds for spec in engines.engines),
        "attentions": sum(spec.attentions for spec in engines.engines),
        "fused": sum(spec.fused for spec in engines.engines),
        "findings": [line for spec in engines.engines for line in spec.findings],
    }


if __name__ == "__main__":
    app()
