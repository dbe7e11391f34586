"""The report on a GPU runs without one too, part by part, and goes on where it ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ditfastattn import ConfigError
from ditfastattn.tools.gpu_report import parts, run
from ditfastattn.tools.gpu_report.fixed_plans import FIXED


def report(out: Path, *more: str) -> dict[str, dict[str, object]]:
    arguments = ["--out", str(out), "--device", "cpu", "--tiny", *more]
    done = CliRunner().invoke(run.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    outcomes = json.loads((out / run.REPORT).read_text(encoding="utf-8"))["parts"]
    return {each["name"]: each for each in outcomes}


@pytest.mark.slow
def test_parts_are_measured_once_each(tmp_path: Path) -> None:
    found = report(tmp_path, "--only", "memory,dit-xl-512")
    assert [each["done"] for each in found.values()] == [True, True]
    data = json.loads((tmp_path / "dit-xl-512.json").read_text(encoding="utf-8"))
    kept = [data[f"dit-tiny: {pattern}"]["attention FLOPs"] for pattern in FIXED]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == pytest.approx(0.25)
    again = report(tmp_path, "--only", "memory,dit-xl-512")
    assert {each["reason"] for each in again.values()} == {"measured before"}


@pytest.mark.slow
def test_what_a_part_could_not_do_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_LEAST", 0.0)
    short = parts.Part("ends before it has begun", 0.01, lambda *_: None)
    unknown = parts.Part("is not known to the process that runs it", 60.0, lambda *_: None)
    monkeypatch.setattr(run, "PARTS", {"memory": short, "unknown": unknown})
    (tmp_path / "memory.json").write_text('{"machine": {}}')  # begun, and not finished
    found = report(tmp_path)
    assert [each["done"] for each in found.values()] == [False, False]
    assert "not finished within" in str(found["memory"]["reason"])
    assert "unknown" in str(found["unknown"]["reason"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--only", "memory,latency"], "no such part"), ([], "torch finds no GPU")],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(run.app, arguments, catch_exceptions=False)
