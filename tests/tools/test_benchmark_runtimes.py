"""One table compares the runtimes of a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from typer.testing import CliRunner

from ditfastattn import Strategy
from ditfastattn.tools.benchmark_runtimes import DENSE, PLANNED, app, table_text
from tests.helpers import tiny_digits_pipeline
from tests.plans import plan_for


def compared(folder: Path, steps: list[Strategy], *more: str) -> tuple[dict[str, Any], str]:
    """Return what the tool records of a tiny pipeline, and its table."""
    pipeline = tiny_digits_pipeline(DDIMScheduler(clip_sample=False))
    call = {"class_labels": [3], "num_inference_steps": len(steps), "guidance_scale": 2.0}
    plan_for(pipeline, call, steps).save(folder / "plan.json")
    pipeline.save_pretrained(folder / "pipeline")
    arguments = ["--plan", str(folder / "plan.json"), "--pipeline", str(folder / "pipeline")]
    done = CliRunner().invoke(
        app, ["run", "--out", str(folder), *arguments, *more], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return json.loads((folder / "runtimes.json").read_text()), done.output


@pytest.mark.slow
def test_runtimes_are_timed_beside_the_dense_model(tmp_path: Path) -> None:
    options = ("--repetitions", "2", "--starts", "0", "--lowering", "eager")
    steps = [Strategy.FULL, Strategy.WINDOW, Strategy.SHARE_STEP]
    found, output = compared(tmp_path, steps, "--only", "onnxruntime; openvino; tpu", *options)
    assert found["absent"]["tpu"].startswith("expected one of: torch, dense")
    assert found["runtimes"].keys() == {"onnxruntime", "openvino"}
    for name, row in found["runtimes"].items():
        assert len(row["speed"]["speedup"]["samples"]) == 2
        assert row["image"] < 1e-3  # of torch's, by the same plan
        assert row["disk_bytes"] > 10_000
        assert f"| {name} |" in output


@pytest.mark.slow
def test_runtimes_are_started_in_processes_of_their_own(tmp_path: Path) -> None:
    """One that compiles, and one that loads a bundle, as packages are loaded too."""
    steps = [Strategy.FULL, Strategy.SHARE_STEP]
    options = ("--repetitions", "1", "--starts", "1")
    found, output = compared(tmp_path, steps, "--only", f"{PLANNED}; onnxruntime", *options)
    rows = found["runtimes"]
    assert rows.keys() == {PLANNED, "onnxruntime"}
    for name, row in rows.items():
        assert row["first_start_seconds"] > 0.5
        assert row["later_start_seconds"] > 0.5
        assert row["peak_bytes"] > 2**27
        assert row["speed"] is not None
        assert (row["compiled_bytes"] > 0) == (name == PLANNED)
        assert row["image"] < 1e-3
        assert f"| {name} |" in output


def test_the_table_has_dashes_for_what_was_not_measured() -> None:
    rows: dict[str, dict[str, Any]] = {
        DENSE: {"disk_bytes": 2**21},
        PLANNED: {"speed": {"speedup": {"median": 2.5}}},
    }
    assert table_text(rows).splitlines()[2:] == [
        "| torch, dense | 1.00x | - | - | 2.00 MiB | - |",
        "| torch, planned | 2.50x | - | - | - | - |",
    ]
