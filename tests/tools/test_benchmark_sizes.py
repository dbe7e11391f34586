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
