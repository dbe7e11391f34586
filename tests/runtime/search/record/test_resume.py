"""A search that is killed at any moment resumes, and finds the same plan."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ditfastattn import Plan

# Counted operations, not measured latency, so that two searches find the same plan.
SEARCH = """
import sys
from pathlib import Path
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from ditfastattn import Target, calibrate
from ditfastattn.tools.digits_pipeline import DigitsPipeline
from tests.helpers import tiny_digits_pipeline

call = {"class_labels": [1, 2], "num_inference_steps": 12, "guidance_scale": 2.0}
calibrate(
    tiny_digits_pipeline(DDIMScheduler(clip_sample=False)),
    call,
    target=Target.min_psnr(float(sys.argv[2])),
    method=sys.argv[3],
    objective="attention-flops",
    out=Path(sys.argv[1]),
)
"""
ROOT = Path(__file__).parents[4]


def start(out: Path, method: str, bound: float = 45.0) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SEARCH, str(out), str(bound), method]
    return subprocess.Popen(command, env=environment, cwd=out.parent, stderr=subprocess.PIPE)


def kept(out: Path) -> int:
    """Count the finished pieces of work."""
    folder = out.with_name(out.name + ".search")
    return len([path for path in folder.glob("*") if not path.name.startswith(".")])


def kill_once_there_are(count: int, out: Path, method: str, delay: float) -> bool:
    """Kill a search some time after it has kept ``count`` pieces; return whether it was killed."""
    process = start(out, method)
    while process.poll() is None and kept(out) < count:
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize(("method", "most_kills"), [("global", 3), ("greedy", 1)])
def test_a_killed_search_resumes_and_finds_the_same_plan(
    method: str, most_kills: int, tmp_path: Path
) -> None:
    moments = random.Random()
    undisturbed = tmp_path / "undisturbed.json"
    finished = start(undisturbed, method)
    _, errors = finished.communicate()
    assert finished.returncode == 0, errors.decode()
    expected = Plan.load(undisturbed)

    out = tmp_path / "plan.json"
    kills = 0
    for _ in range(most_kills):
        count, delay = kept(out) + moments.randint(1, 4), moments.uniform(0.0, 0.3)
        before = kept(out)
        if not kill_once_there_are(count, out, method, delay):
            break
        kills += 1
        if out.exists():  # killed as it ended: the plan is complete
            assert Plan.load(out).strategies == expected.strategies
            break
        assert kept(out) >= before, "finished work was lost"
    assert kills > 0
    last = start(out, method)
    _, errors = last.communicate()
    assert last.returncode == 0, errors.decode()

    found = Plan.load(out)
    assert found.strategies == expected.strategies
    assert found.sampler == expected.sampler
    assert found.calibration.calibrated == expected.calibration.calibrated
    assert found.calibration.held_out == expected.calibration.held_out
    assert expected.changed > 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == []
