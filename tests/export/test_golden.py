"""A bundle is checked by its golden sample, without the pipeline that it was exported from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from safetensors.torch import load_file

from ditfastattn import ConfigError, Strategy, export, load, verify
from ditfastattn.core.tensor_files import write_tensors
from ditfastattn.export.options import ExportOptions
from ditfastattn.runtime.bundle.golden import GOLDEN_FILE
from ditfastattn.runtime.bundle.manifest import MANIFEST, file_hash, manifest_text, read_manifest
from tests.export.helpers import export_tiny
from tests.helpers import (
    capture_every_site,
    mixed_strategies,
    tiny_digits_pipeline,
    tiny_dit,
    tiny_pixart,
)
from tests.plans import plan_for

STEPS = [
    Strategy.FULL,
    Strategy.WINDOW_SHARE_CFG,
    Strategy.FULL,
    Strategy.EXTRAPOLATE,
    Strategy.SHARE_STEP,
]


def test_the_golden_sample_is_the_pipelines_generation(tmp_path: Path) -> None:
    pipeline = tiny_digits_pipeline(DPMSolverMultistepScheduler())
    call: dict[str, Any] = {
        "class_labels": [1],
        "num_inference_steps": len(STEPS),
        "guidance_scale": 2.0,
    }
    out = tmp_path / "bundle"
    export(pipeline, call, plan_for(pipeline, call, STEPS), out, loop=True)
    found = verify(out)
    assert found.passed
    assert len(found.step_errors) == len(STEPS)
    assert 0.0 < max(found.step_errors) < 1e-5
    assert 0.0 < found.latents_error < 1e-5
    assert 0.0 < found.loop_error < 1e-5
    pipeline.transformer = load(out)  # type: ignore[assignment]  # it stands in
    generator = torch.Generator().manual_seed(0)  # that of the export
    images = pipeline(**call, generator=generator, output_type="pt", return_dict=False)[0]
    latents = load_file(out / GOLDEN_FILE)["latents"]
    assert float(((latents / 2 + 0.5).clamp(0, 1) - images).abs().max()) < 1e-4


@pytest.mark.parametrize("make", [tiny_dit, tiny_pixart])
@pytest.mark.parametrize("dense", [False, True])
def test_a_bundle_of_an_unknown_sampler_is_checked_step_by_step(
    make: Any, dense: bool, tmp_path: Path
) -> None:
    tiny = make()
    rows = None if dense else mixed_strategies(capture_every_site(tiny)[1], seed=5)
    manifest = export_tiny(tiny, rows, tmp_path / "bundle")
    assert manifest.stepping is None
    found = verify(tmp_path / "bundle")
    assert found.passed
    assert len(found.step_errors) == len(manifest.schedule)
    assert 0.0 < max(found.step_errors) < 1e-4


def test_a_bundle_that_differs_from_its_golden_sample_does_not_pass(tmp_path: Path) -> None:
    tiny, out = tiny_dit(), tmp_path / "bundle"
    export_tiny(tiny, None, out)
    sample = load_file(out / GOLDEN_FILE)
    sample["outputs/0/sample"] += 1e-3
    write_tensors(out / GOLDEN_FILE, sample)
    data = read_manifest(out).model_dump(mode="json")
    data["files"][GOLDEN_FILE] = {
        "bytes": (out / GOLDEN_FILE).stat().st_size,
        "sha256": file_hash(out / GOLDEN_FILE),
    }
    (out / MANIFEST).write_text(manifest_text(data))
    assert not verify(out).passed


def test_without_a_golden_sample_a_pipeline_is_needed(tmp_path: Path) -> None:
    export_tiny(tiny_dit(), None, tmp_path / "bundle", options=ExportOptions(golden=False))
    with pytest.raises(ConfigError, match=r"no golden sample(.|\n)*give the pipeline"):
        verify(tmp_path / "bundle")
