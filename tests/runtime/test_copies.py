"""A copy of an accelerated pipeline runs its own weights, dense, and says so."""

from __future__ import annotations

import copy
import io
import logging
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

import ditfastattn
from ditfastattn import Plan
from ditfastattn.tools.digits_pipeline import DigitsPipeline
from tests.helpers import attentive_pipeline
from tests.three_steps import run
from tests.works_with import works_with


def change_weights(pipeline: Any) -> None:
    with torch.no_grad():
        for parameter in pipeline.transformer.parameters():
            parameter.mul_(0.5)


def saved_and_loaded(pipeline: Any) -> Any:
    file = io.BytesIO()
    torch.save(pipeline, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pipeline: pickle.loads(pickle.dumps(pipeline)),
    "torch.save": saved_and_loaded,
}


@works_with(
    "Copies and processes",
    "`copy.deepcopy`, pickle or `torch.save` of an accelerated pipeline",
    "runs dense, with a warning",
    "the copy has its own weights; the original keeps its plan",
)
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_runs_its_own_weights(
    way: str, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.reset()
    pipeline = attentive_pipeline()
    dense = run(pipeline)
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    planned = run(pipeline)
    assert not torch.equal(planned, dense)
    with caplog.at_level(logging.WARNING, logger="ditfastattn"):
        copied = COPIES[way](pipeline)
    assert "runs dense" in caplog.text
    assert torch.equal(run(copied), dense)
    change_weights(copied)
    other = attentive_pipeline()
    change_weights(other)
    expected = run(other)
    assert torch.equal(run(copied), expected)
    assert torch.equal(run(pipeline), planned)
    ditfastattn.restore(copied)  # it is not accelerated: nothing happens
    assert torch.equal(run(copied), expected)
    assert torch.equal(run(pipeline), planned)


@works_with(
    "Copies and processes",
    "`accelerate` with such a copy",
    "works",
    "each is restored by itself",
)
def test_a_copy_is_accelerated_and_restored_by_itself(plan: Plan) -> None:
    torch._dynamo.reset()
    pipeline = attentive_pipeline()
    dense = run(pipeline)
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    planned = run(pipeline)
    copied = copy.deepcopy(pipeline)
    ditfastattn.accelerate(copied, plan, lowering="eager")
    assert torch.equal(run(copied), planned)
    ditfastattn.restore(pipeline)
    assert torch.equal(run(copied), planned)
    assert torch.equal(run(pipeline), dense)
    ditfastattn.restore(copied)
    assert torch.equal(run(copied), dense)


def test_a_shallow_copy_of_the_transformer_is_restored_alone(plan: Plan) -> None:
    torch._dynamo.reset()
    pipeline = attentive_pipeline()
    dense = run(pipeline)
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    planned = run(pipeline)
    scheduler: Any = DDIMScheduler(clip_sample=False)
    other = DigitsPipeline(copy.copy(pipeline.transformer), scheduler)
    other.set_progress_bar_config(disable=True)  # type: ignore[no-untyped-call]  # diffusers
    ditfastattn.restore(other)
    assert torch.equal(run(other), dense)
    assert torch.equal(run(pipeline), planned)


def spawned(pipeline: Any, results: Any) -> None:
    results.put(run(pipeline).tolist())


@works_with(
    "Copies and processes",
    "an accelerated pipeline handed to a spawned process",
    "runs dense, with a warning",
    "call `accelerate` there",
)
@pytest.mark.slow
def test_a_spawned_process_runs_its_copy_dense(plan: Plan) -> None:
    torch._dynamo.reset()
    pipeline = attentive_pipeline()
    dense = run(pipeline)
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    run(pipeline)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=spawned, args=(pipeline, results))
    process.start()
    got = torch.tensor(results.get(timeout=120))
    process.join()
    assert process.exitcode == 0
    assert torch.equal(got, dense)


def forked(pipeline: Any, results: Any) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    results.put(run(pipeline).tolist())


@works_with(
    "Copies and processes",
    "a process forked (`os.fork`, `multiprocessing`) from one with an accelerated pipeline",
    "works",
    "on the CPU, with `torch.set_num_threads(1)` in the child; a GPU does not survive a fork",
)
def test_a_forked_process_runs_by_the_plan(plan: Plan) -> None:
    torch._dynamo.reset()
    pipeline = attentive_pipeline()
    dense = run(pipeline)
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    planned = run(pipeline)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=forked, args=(pipeline, results))
    process.start()
    got = torch.tensor(results.get(timeout=120))
    process.join()
    assert process.exitcode == 0
    assert torch.equal(got, planned)
    assert not torch.equal(got, dense)
    assert torch.equal(run(pipeline), planned)
