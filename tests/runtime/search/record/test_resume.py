"""A search that is killed at any moment resumes, and finds the same plan."""

from __future__ import annotations

import multiprocessing
import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from ditfastattn import Plan, Target, calibrate
from ditfastattn.runtime.search.record.checkpoint import Checkpoint, open_checkpoint
from tests.helpers import tiny_digits_pipeline

CALL: dict[str, Any] = {"class_labels": [1, 2], "num_inference_steps": 8, "guidance_scale": 2.0}


def search(out: Path, method: str) -> None:
    """Search by counted operations, not measured latency, so that two searches find one plan."""
    calibrate(
        tiny_digits_pipeline(DDIMScheduler(clip_sample=False)),
        CALL,
        target=Target.min_psnr(45.0),
        method=method,
        objective="attention-flops",
        out=out,
    )


def search_forked(out: Path, method: str) -> None:
    torch.set_num_threads(1)  # a fork does not have the others
    search(out, method)


def start(out: Path, method: str) -> BaseProcess:
    """Search in a process of its own: a fork, which has imported everything already."""
    process = multiprocessing.get_context("fork").Process(target=search_forked, args=(out, method))
    process.start()
    return process


def kept(out: Path) -> int:
    """Count the finished pieces of work."""
    folder = out.with_name(out.name + ".search")
    return len([path for path in folder.glob("*") if not path.name.startswith(".")])


def kill_once_there_are(count: int, out: Path, method: str, delay: float) -> bool:
    """Kill a search some time after it has kept ``count`` pieces; return whether it was killed."""
    process = start(out, method)
    while process.is_alive() and kept(out) < count:
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode == -SIGKILL


@pytest.mark.parametrize(
    ("method", "most_kills"), [("global", 3), pytest.param("greedy", 1, marks=pytest.mark.slow)]
)
def test_a_killed_search_resumes_and_finds_the_same_plan(
    method: str, most_kills: int, tmp_path: Path
) -> None:
    moments = random.Random()
    undisturbed = tmp_path / "undisturbed.json"
    search(undisturbed, method)
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
    last.join()
    assert last.exitcode == 0

    found = Plan.load(out)
    assert found.strategies == expected.strategies
    assert found.sampler == expected.sampler
    assert found.calibration.calibrated == expected.calibration.calibrated
    assert found.calibration.held_out == expected.calibration.held_out
    assert expected.changed > 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == []


@pytest.mark.parametrize("damage", ["", "{", '{"sha256": "0", "content": "{}"}', None])
def test_pieces_of_a_search_that_nobody_knows_are_not_taken(
    damage: str | None, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    with open_checkpoint(plan) as checkpoint:
        checkpoint.begin({"target": 1})
        checkpoint.put("piece", {"psnr": float("inf")})
        assert checkpoint.peek("piece") == {"psnr": float("inf")}
    request = tmp_path / "plan.json.search" / "request.json"
    if damage is None:
        request.unlink()
    else:
        request.write_text(damage)
    with open_checkpoint(plan) as checkpoint:
        assert not checkpoint.begin({"target": 2})
        assert checkpoint.peek("piece") is None
        assert checkpoint.begin({"target": 2})


def test_parts_of_the_work_keep_pieces_of_one_name_apart(tmp_path: Path) -> None:
    with open_checkpoint(tmp_path / "plan.json") as checkpoint:
        checkpoint.begin({"method": "joint"})
        for number, each in enumerate((checkpoint, checkpoint.part("phase-1"))):
            each.put("costs", number)
        again = Checkpoint(tmp_path / "plan.json.search")
        assert (again.peek("costs"), again.part("phase-1").peek("costs")) == (0, 1)
        assert again.part("phase-2").peek("costs") is None
        checkpoint.discard()
    assert not (tmp_path / "plan.json.search").exists()
