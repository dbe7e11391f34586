"""What refreshing the residual is worth is measured on the same seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from typer.testing import CliRunner

from ditfastattn.tools.benchmark_residual import PATTERNS, app
from tests.helpers import tiny_digits_pipeline


def test_each_pattern_is_run_with_and_without(tmp_path: Path) -> None:
    tiny_digits_pipeline(DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path / "tiny")
    options = ["--pipeline", str(tmp_path / "tiny"), "--steps", "4", "--seeds", "2"]
    done = CliRunner().invoke(app, ["--out", str(tmp_path), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "residual.json").read_text())["patterns"]
    assert found.keys() == PATTERNS.keys()
    for row in found.values():
        old, new = row["share-cfg"], row["share-cfg+refresh"]
        assert row["gain"]["mean"] == pytest.approx(new["mean"] - old["mean"])
        assert row["gain"]["mean"] != 0.0
        assert 0.0 < new["attention_flops"] < 1.0
        assert 0.0 < old["attention_flops"] < 1.0
