"""A server under load: every image is compared with its twin, made alone."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import ditfastattn
from ditfastattn import ConfigError, Plan, Strategy
from ditfastattn.serving.images import ImageServer
from ditfastattn.serving.limits import Limits
from ditfastattn.tools import benchmark_ray, benchmark_serving
from ditfastattn.tools.benchmark_serving import app, table_text
from ditfastattn.tools.benchmarking.served_images import (
    Answers,
    ask_all,
    make_bodies,
    make_twins,
)
from ditfastattn.tools.measure import slope_per_100
from tests.helpers import attentive_pipeline
from tests.plans import plan_for
from tests.serving.servers import filled_book, running
from tests.three_steps import CALL


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = {"high": (Strategy.FULL, Strategy.FULL, Strategy.SHARE_STEP)}
    plans: dict[str, Plan] = {
        name: plan_for(attentive_pipeline(), CALL, row) for name, row in rows.items()
    }
    return filled_book(tmp_path_factory.mktemp("load") / "book", plans).folder


def test_requests_are_of_all_tiers_and_sizes_and_the_same_each_time() -> None:
    bodies = make_bodies(12, ("lossless", "high"), ("1", "2"), {})
    assert {(body["quality"], body["n"]) for body in bodies} == {
        (tier, n) for tier in ("lossless", "high") for n in (1, 2)
    }
    assert len({(body["prompt"], body["seed"]) for body in bodies}) == 2
    assert bodies == make_bodies(12, ("lossless", "high"), ("1", "2"), {})


def test_images_are_compared_and_refusals_are_counted(book: Path) -> None:
    torch._dynamo.reset()
    opened, limits = ditfastattn.book(book), Limits(queue=2, images=2)
    alone = ImageServer(attentive_pipeline(), opened, lowering="eager")
    served = ImageServer(attentive_pipeline(), opened, lowering="eager", limits=limits)
    call = {"num_inference_steps": 3, "guidance_scale": 2.0}
    bodies = make_bodies(6, opened.manifest.names, ("1", "2"), call)
    twins = dict(make_twins(alone, bodies))
    twins["high", "2", 10] = twins["high", "2", 10] + 3
    answers, late = Answers(), Answers()
    with running(served) as server:
        url = f"http://127.0.0.1:{server.port}"
        ask_all(url, bodies, 6, twins, math.inf, answers)
        ask_all(url, [{**bodies[0], "quality": "best"}], 1, twins, math.inf, late)
        ask_all(url, bodies, 1, twins, 0.0, late)
    found = answers.summary()
    assert (found["requests"], found["images"], found["failed"]) == (6, 8, [])
    assert found["refused"] > 0
    assert found["images_that_differ"] == sum(
        (body["quality"], body["prompt"]) == ("high", "2") for body in bodies
    )
    assert found["most_levels_apart"] == 3
    assert found["latency_seconds"].keys() == {"lossless", "high"}
    assert len(late.failed) == 1
    assert "no such quality" in late.failed[0]
    assert late.levels == []


def test_the_slope_is_that_of_least_squares() -> None:
    assert slope_per_100([(0, 7), (50, 17), (100, 27)]) == pytest.approx(20)
    assert slope_per_100([(0, 7), (10, 9), (20, 7)]) == pytest.approx(0)
    with pytest.raises(ConfigError, match="too few samples"):
        slope_per_100([(3, 7)])


@pytest.mark.slow  # its parts are tested above
def test_a_load_is_continued_and_a_soak_has_a_slope(
    book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline: Any = attentive_pipeline()
    pipeline.save_pretrained(tmp_path / "pipeline")
    named = ["--out", str(tmp_path), "--pipeline", str(tmp_path / "pipeline"), "--book", str(book)]
    named += ["--prompts", "1;2", "--lowering", "eager"]

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, [*arguments, *named], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    shape = ("load", "--requests", "4", "--batches", "1", "--turns", "2", "--long-steps", "5")
    run(*shape, "--concurrency", "2")
    first = json.loads((tmp_path / "load.json").read_text())
    assert first["complete"]
    assert [row["asked"] for row in first["rows"]] == ["all tiers", "dense only", "short and long"]
    assert [row["images_that_differ"] for row in first["rows"]] == [0, 0, 0]
    assert {row["turns"] for row in first["rows"]} == {2}
    latency = first["rows"][-1]["latency_seconds"]
    assert {tier: each["requests"] for tier, each in latency.items()} == {"high": 3, "lossless": 1}
    # What an interrupted run has left is kept, and not what one of other arguments has.
    (tmp_path / "load.json").write_text(json.dumps(first | {"complete": False}))
    output = run(*shape, "--concurrency", "1,2", "--minutes", "0")
    assert table_text(first["rows"]) in output
    assert "3 of 6 rows: run it again to continue" in output
    output = run("load", "--requests", "5", "--batches", "1", "--minutes", "0")
    assert "0 of 6 rows" in output

    monkeypatch.setattr(benchmark_serving, "MOST_SLOPE", math.inf)  # so few tell nothing
    monkeypatch.setattr(benchmark_serving, "_SAMPLED", 0.02)
    run("soak", "--generations", "10")
    soaked = json.loads((tmp_path / "soak.json").read_text())
    assert (soaked["images"], soaked["images_that_differ"]) == (10, 0)
    assert soaked["resident_bytes"][-1][0] == 10
    assert soaked["resident_bytes"][0][1] > 2**26


def test_requests_may_be_lost_on_the_killed_node_alone() -> None:
    right, lost, differs = Answers(levels=[0]), Answers(failed=["gone"] * 2), Answers(levels=[1])
    assert not benchmark_ray._wrong(right, lost, right, concurrency=2)
    for rounds in ((lost, right, right), (right, right, lost), (right, differs, right)):
        assert benchmark_ray._wrong(*rounds, concurrency=2)
    assert benchmark_ray._wrong(right, lost, right, concurrency=1)


def test_without_ray_there_are_no_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"Ray is not installed[\s\S]*serve-ray"):
        benchmark_ray._two_nodes().__enter__()
