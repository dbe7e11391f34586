"""Models of published sizes are captured and rewritten where nothing is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ditfastattn.tools import benchmark_sizes
from ditfastattn.tools.bench.random_models import ARCHITECTURES


@pytest.mark.slow
def test_a_model_is_captured_and_rewritten_without_weights() -> None:
    found = {
        name: benchmark_sizes.measure(ARCHITECTURES[name](), 6, 4)
        for name in ("sd3-tiny", "flux-tiny")
    }
    for each in found.values():
        assert each["variants"] == 4
        assert each["sites"] > 0
        assert each["cache_bytes"] > 0
        assert each["distinct_regions"] < each["regions"]
        assert each["seconds"].keys() == {"capture", "find sites", "unroll", "rewrite", "outline"}


def test_half_of_the_layers_is_measured_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alone(module: str, *arguments: str) -> dict[str, Any]:
        assert module == "benchmark_sizes"
        done = CliRunner().invoke(benchmark_sizes.app, [*arguments])
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    monkeypatch.setattr(benchmark_sizes, "run_alone", alone)
    arguments = ["run", "--out", str(tmp_path), "--models", "dit-tiny", "--steps", "4"]
    done = CliRunner().invoke(benchmark_sizes.app, [*arguments, "--variants", "2"])
    assert done.exit_code == 0, done.output
    parts = json.loads((tmp_path / "sizes.json").read_text())["models"]["dit-tiny"]
    assert parts["half"]["sites"] == parts["whole"]["sites"] // 2
    assert parts["half the steps"]["sites"] == parts["whole"]["sites"]


def test_compiling_is_measured_dense_and_by_a_plan_whole_and_by_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def uncached(module: str, *arguments: str) -> dict[str, Any]:
        done = CliRunner().invoke(benchmark_sizes.app, [*arguments])
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    def lower(module: Any, args: Any, lowering: Any, inductor: Any, outlined: bool) -> Any:
        lowered.append(outlined)
        return module

    lowered: list[bool] = []
    monkeypatch.setattr(benchmark_sizes, "run_uncached", uncached)
    monkeypatch.setattr(benchmark_sizes, "lower", lower)  # Inductor's minutes
    monkeypatch.setattr(benchmark_sizes, "start_inductor", lambda: None)
    arguments = ["compile", "--out", str(tmp_path), "--model", "dit-tiny", "--steps", "4"]
    done = CliRunner().invoke(benchmark_sizes.app, [*arguments, "--variants", "2"])
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "compile.json").read_text())["results"]
    counts = {
        part: {k: v["steps_compiled"] for k, v in each.items()} for part, each in results.items()
    }
    assert counts == {"whole": {"dense": 1, "plan": 2}, "half": {"dense": 1, "plan": 2}}
    assert lowered == [False, True, True] * 2
    parameters = [results[part]["dense"]["parameters"] for part in ("half", "whole")]
    assert parameters[0] < parameters[1]
