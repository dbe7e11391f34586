"""A bundle gets other weights of its structure, as a whole, while programs run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from ditfastattn import (
    ConfigError,
    Strategy,
    TargetMissedError,
    export,
    load,
    update_weights,
    verify,
)
from ditfastattn.runtime.bundle.manifest import file_hash, read_manifest
from ditfastattn.runtime.search.judge.targets import Target
from tests.helpers import tiny_digits_pipeline
from tests.plans import plan_for

CALL: dict[str, Any] = {"class_labels": [1], "num_inference_steps": 3, "guidance_scale": 2.0}
STEPS = [Strategy.FULL, Strategy.WINDOW_SHARE_CFG, Strategy.SHARE_STEP]


def styled(size: int = 16) -> Any:
    """Return the pipeline with other weights; two that were equal now differ."""
    pipeline: Any = tiny_digits_pipeline(DDIMScheduler(clip_sample=False), size)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in pipeline.transformer.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return pipeline


def exported(out: Path, target: Target | None = None) -> None:
    pipeline = tiny_digits_pipeline(DDIMScheduler(clip_sample=False))
    torch._dynamo.reset()
    export(pipeline, CALL, plan_for(pipeline, CALL, STEPS, target), out, loop=True)


def contents(out: Path) -> dict[str, str]:
    return {path.name: file_hash(path) for path in out.iterdir()}


def test_a_bundle_gets_other_weights_while_a_program_runs_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, pipeline = tmp_path / "bundle", styled()
    exported(out)
    noise = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 10])
    running = load(out)
    before, old = running.generate(noise, class_labels=labels), read_manifest(out)
    with pytest.raises(ConfigError, match=r"plan\.model\.weights"):
        verify(out, pipeline, CALL)
    manifest = update_weights(out, pipeline, CALL)
    assert manifest.model.fingerprint.weights != old.model.fingerprint.weights
    assert manifest.variants == old.variants
    assert "measured with other weights" in caplog.text
    assert torch.equal(running.generate(noise, class_labels=labels), before)
    assert not torch.allclose(load(out).generate(noise, class_labels=labels), before)
    torch._dynamo.reset()
    assert verify(out, pipeline, CALL).passed
    assert verify(out).passed


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    exported(out)
    before = contents(out)
    with pytest.raises(ConfigError, match="the plan does not match this model"):
        update_weights(out, styled(32), CALL)
    deeper: Any = styled()
    blocks = deeper.transformer.transformer_blocks
    blocks.append(blocks[0])
    with pytest.raises(ConfigError, match="the plan does not match this model"):
        update_weights(out, deeper, CALL)
    with pytest.raises(ConfigError, match="the plan does not match this sampler"):
        update_weights(out, styled(), {**CALL, "guidance_scale": 3.0})
    assert contents(out) == before
    assert verify(out).passed


def test_a_plan_that_misses_its_target_with_the_weights_leaves_the_bundle(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    exported(out, Target.min_psnr(90.0))
    before = contents(out)
    with pytest.raises(TargetMissedError):
        update_weights(out, styled(), CALL, revalidate=True)
    assert contents(out) == before
