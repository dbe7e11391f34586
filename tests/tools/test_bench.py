"""The benchmark against caching libraries, on a tiny untrained pipeline, nothing compiled."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor
from typer.testing import CliRunner

from ditfastattn import ConfigError
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search.measure.contender import dense_contender
from ditfastattn.runtime.search.measure.timing import measure_turns
from ditfastattn.tools.bench import peers, setup
from ditfastattn.tools.bench.fidelity import MOST_PSNR, fidelity
from ditfastattn.tools.bench.forms import Form, PeerContender, fresh_copy, peer_contender
from ditfastattn.tools.bench.harness import Bench
from ditfastattn.tools.bench.methods import EAGER, FEWER
from ditfastattn.tools.bench.models import BenchModel, model_named
from ditfastattn.tools.bench.peers import PEERS, peers_named
from ditfastattn.tools.bench.peers.base import Peer, Scope, Setting, Subject
from ditfastattn.tools.bench.random_models import ARCHITECTURES
from ditfastattn.tools.bench.report import best_at
from ditfastattn.tools.bench.rules import OTHERS, evenly
from ditfastattn.tools.bench.run import run_bench
from ditfastattn.tools.bench.setup import BenchOptions
from ditfastattn.tools.commands import app as cli
from ditfastattn.tools.terminal import open_console
from tests.helpers import randomize, tiny_digits_pipeline
from tests.tiny_pipelines import TINY_PIPELINES

STEPS = 8
PROMPTS = [
    Prompt({"class_labels": [k], "num_inference_steps": STEPS, "guidance_scale": 2.0}, 1000 + k)
    for k in range(2)
]


def tiny_pipeline() -> Any:
    pipeline = tiny_digits_pipeline(DDIMScheduler(clip_sample=False))
    randomize(pipeline.transformer)
    return pipeline


TINY = BenchModel(
    name="tiny",
    open=tiny_pipeline,
    call=lambda index: {"class_labels": [index % 10], "guidance_scale": 2.0},
    calibration={"class_labels": [0, 3], "guidance_scale": 2.0},
    conditional_first=True,
)


def contender_of(peer: Peer, setting: Setting, pipeline: Any) -> PeerContender:
    calibration = None
    if peer.calibrate is not None:
        subject = Subject(fresh_copy(pipeline.transformer), STEPS)

        def generate(scope: Scope) -> None:
            PeerContender(pipeline, subject.transformer, PROMPTS, scope).generate(0)

        calibration = peer.calibrate(subject, generate)
    return peer_contender(TINY, pipeline, PROMPTS, STEPS, peer, setting, Form.EAGER, calibration)


def images(contender: Any) -> Tensor:
    return torch.cat(contender.by_prompt())


@pytest.fixture(params=PEERS, ids=lambda peer: peer.name)
def peer(request: pytest.FixtureRequest) -> Peer:
    found: Peer = request.param
    pytest.importorskip(found.library)
    return found


def test_fidelity_is_what_a_hand_computes() -> None:
    dense = torch.full((2, 1, 16, 16), 0.2)
    dense[1] = 10.0 / 255.0
    other = dense.clone()
    other[0] += 0.1  # mean squared error 0.01: 20 dB
    other[1] = 0.0  # in bytes this difference of -10 would wrap to 246
    found = fidelity(dense, other)
    assert found.psnrs == pytest.approx((20.0, 20.0 * math.log10(255.0 / 10.0)), abs=1e-3)
    assert found.psnr == pytest.approx(sum(found.psnrs) / 2.0)
    # Of two flat images only the luminance term is left; its constant is (0.01 * range) ** 2.
    c1 = 1e-4
    assert found.ssims[0] == pytest.approx((2 * 0.2 * 0.3 + c1) / (0.04 + 0.09 + c1), abs=1e-4)
    assert found.worst_ssim == min(found.ssims)


def test_equal_images_have_an_ssim_of_one_and_a_finite_psnr() -> None:
    same = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    found = fidelity(same, same.clone())
    assert (found.ssim, found.psnr) == (1.0, MOST_PSNR)


def test_a_peer_that_computes_everything_is_dense(peer: Peer) -> None:
    pipeline = tiny_pipeline()
    dense = images(dense_contender(pipeline, PROMPTS, Lowering.EAGER))
    same = images(contender_of(peer, peer.dense, pipeline))
    assert torch.allclose(same, dense, atol=1e-4)


def test_a_peers_strongest_setting_changes_the_images_alike_each_time(peer: Peer) -> None:
    pipeline = tiny_pipeline()
    dense = images(dense_contender(pipeline, PROMPTS, Lowering.EAGER))
    contender = contender_of(peer, peer.settings[-1], pipeline)
    first = images(contender)
    assert float((first - dense).abs().max()) > 1e-3
    again = images(dense_contender(pipeline, PROMPTS, Lowering.EAGER))
    assert again.equal(dense)  # the copy is apart
    contender.images.clear()
    contender.generate(1)
    contender.generate(0)  # after another prompt
    assert torch.equal(images(contender), first)


@pytest.mark.parametrize("name", ["dit-tiny", "pixart-tiny", "sd3-tiny", "flux-tiny"])
def test_models_of_random_weights_generate_what_their_prompt_says(name: str) -> None:
    model = model_named(name)
    pipeline = model.open()
    pipeline.set_progress_bar_config(disable=True)
    one, other = model.test_prompts(2, 2)
    contender = dense_contender(pipeline, [one, other, one], Lowering.EAGER)
    first, second, again = contender.by_prompt()
    assert first.equal(again)
    assert not first.equal(second)
    assert first.shape[:2] == (1, 3)


def test_a_copy_shares_the_weights() -> None:
    transformer = tiny_pipeline().transformer
    copied = fresh_copy(transformer)
    assert copied is not transformer
    pairs = zip(transformer.parameters(), copied.parameters(), strict=True)
    assert all(one is other for one, other in pairs)


def test_contenders_take_turns_and_a_disturbed_repetition_is_timed_again() -> None:
    order: list[str] = []
    compiled = iter([0, 1, 1, 1, 1, 1])

    def call(name: str) -> Callable[[int], None]:
        return lambda _: order.append(name)

    found = measure_turns(call("a"), [call("b"), call("c")], 2, lambda: next(compiled))
    assert order == ["a", "b", "c", "a", "b", "c", "b", "c", "a"]
    assert [len(timing.speedup.samples) for timing in found] == [2, 2]


def options(*peers: Peer) -> BenchOptions:
    return BenchOptions(
        steps=4,
        peers=peers,
        speedups=(1.1, 1.5),
        work=(0.5,),
        fewer=(0.5,),
        rules=(0.5,),
        repetitions=3,
        seeds=4,
        lowering=Lowering.EAGER,
    )


def without_ours(*peers: Peer) -> BenchOptions:
    return replace(options(*peers), speedups=(), work=(), rules=())


def broken(*_: Any) -> Scope:
    raise RuntimeError("no such block\nand more")


def few(name: str) -> Peer:
    (found,) = peers_named(name)
    return replace(found, settings=found.settings[-1:])


@pytest.mark.slow
def test_the_bench_writes_every_contender_and_every_failure(tmp_path: Path) -> None:
    failing = replace(few("first-block"), name="broken", apply=broken)
    run_bench(open_console(), TINY, options(few("first-block"), failing), tmp_path, False)
    data = json.loads((tmp_path / "tiny-4.json").read_text(encoding="utf-8"))
    assert (data["model"], data["steps"], data["repetitions"]) == ("tiny", 4, 3)
    assert data["seeds"] == list(range(1000, 1004))
    assert data["versions"]["torch"] == torch.__version__
    assert data["machine"]["device"]
    assert data["command"].startswith("ditfastattn")
    lanes: dict[str, list[Any]] = {}
    for record in data["lanes"]:
        lanes.setdefault(record["method"], []).append(record)
        assert len(record["speedup"]["samples"]) == 3
        assert len(record["psnrs"]) == len(record["ssims"]) == 4
        assert record["worst_ssim"] <= record["ssim"] <= 1.0
        assert record["worst_psnr"] <= record["psnr"]
        assert record["seconds"]["median"] > 0.0
        assert record["form"] == "eager"
        timed = record["psnrs"][:3]  # the same images, the first of them timed
        assert record["timed_psnr"] == pytest.approx(sum(timed) / 3, abs=0.5)
    rules = {plans.name for plans in OTHERS}
    ours = {f"ditfastattn-{kind}-{m}" for kind in ("sites", "steps") for m in ("ssim", "psnr")}
    assert set(lanes) == {EAGER, FEWER, "first-block"} | ours | rules
    assert lanes[EAGER][0]["ssim"] == 1.0
    assert lanes["first-block"][0]["details"] == {"threshold": 0.2}
    gentle, strong = lanes["ditfastattn-sites-ssim"]
    # Of its first step, and of what is cheap to no purpose, a plan shares nothing.
    assert 0.0 < strong["details"]["attention_flops"] < gentle["details"]["attention_flops"] <= 1.0
    assert strong["details"]["matrix_flops"] < gentle["details"]["matrix_flops"]
    assert gentle["psnr"] > strong["psnr"]
    (whole,) = lanes["ditfastattn-steps-psnr"]
    assert whole["setting"] == "2 runs"
    assert whole["details"]["attention_flops"] == pytest.approx(0.5)
    (fewer,) = lanes[FEWER]
    assert (fewer["setting"], fewer["details"]) == ("2 steps", {"steps": 2})
    assert fewer["ssim"] < 1.0
    assert [row["metric"] for row in data["best"]] == ["ssim"] * 6 + ["psnr"] * 4
    (failure,) = (item for item in data["failures"] if item["method"] == "broken")
    assert failure["reason"] == "RuntimeError: no such block"
    assert (tmp_path / "tiny-4-ssim.png").stat().st_size > 1000
    assert (tmp_path / "tiny-4-psnr.png").stat().st_size > 1000
    assert not list(tmp_path.glob("*.search"))


def test_steps_are_spread_evenly_from_the_first_to_the_last() -> None:
    assert evenly(5, 9) == [0, 2, 4, 6, 8]
    assert evenly(1, 9) == [0]


@pytest.mark.slow
def test_a_users_pipeline_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, call = TINY_PIPELINES["pixart"]
    build().save_pretrained(tmp_path / "pixart")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n", encoding="utf-8")
    rest = {name: item for name, item in call.items() if name != "prompt"}
    eager = partial(BenchOptions, lowering=Lowering.EAGER)
    monkeypatch.setattr(setup, "BenchOptions", eager)
    peer = few("first-block")
    monkeypatch.setattr(peers, "PEERS", (peer,))
    arguments = ["bench", "--pipeline", str(tmp_path / "pixart"), "--call", json.dumps(rest)]
    arguments += ["--prompts", str(tmp_path / "prompts.txt"), "--steps", "4", "--seeds", "10"]
    arguments += ["--speedups", "", "--work", "0.5", "--fewer", "0.5", "--rules", ""]
    arguments += ["--repetitions", "10"]
    arguments += ["--peers", "first-block", "--out", str(tmp_path)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "pixart-4.json").read_text(encoding="utf-8"))
    counts = Counter(record["method"] for record in data["lanes"])
    assert (counts[EAGER], counts[FEWER], counts["first-block"]) == (1, 1, len(peer.settings))
    assert counts["ditfastattn-steps-ssim"] == 1
    assert data["failures"] == []


def test_a_resumed_run_measures_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = few("first-block")
    applied = iter(range(100))

    def second_time(*given: Any) -> Scope:
        if next(applied) == 1:  # images have been compared, and now it is timed
            raise KeyboardInterrupt
        return first.apply(*given)

    killed = replace(first, name="killed", apply=second_time)
    with pytest.raises(KeyboardInterrupt):
        run_bench(open_console(), TINY, without_ours(few("pyramid"), killed), tmp_path, False)
    done: list[str] = []
    measure, images = Bench._measure, Bench._images

    def measured(self: Bench, method: Any, *rest: Any) -> Any:
        done.append(f"timed {method.name}")
        return measure(self, method, *rest)

    def compared(self: Bench, entry: Any) -> Any:
        done.append(f"images {entry.setting}")
        return images(self, entry)

    monkeypatch.setattr(Bench, "_measure", measured)
    monkeypatch.setattr(Bench, "_images", compared)
    data = run_bench(open_console(), TINY, without_ours(few("pyramid"), killed), tmp_path, False)
    assert done == ["timed killed"]
    methods = [record["method"] for record in data["lanes"]]
    assert methods == [EAGER, FEWER, "pyramid", "killed"]


def interrupted(*_: Any) -> Scope:
    raise KeyboardInterrupt


def test_an_unfinished_run_of_other_arguments_is_not_mixed_in(tmp_path: Path) -> None:
    killed = replace(few("first-block"), apply=interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_bench(open_console(), TINY, without_ours(killed), tmp_path, False)
    with pytest.raises(ConfigError, match=r"request\.json: (speedups|rules|work)"):
        run_bench(open_console(), TINY, replace(options(), speedups=(2.0,)), tmp_path, False)


def record(method: str, ssim: float, speedup: float) -> dict[str, Any]:
    named = {"method": method, "setting": "s", "form": "f", "worst_ssim": ssim, "psnr": 20.0}
    named |= {"worst_psnr": 20.0, "ssims": [ssim, ssim + 0.01]}
    return {**named, "ssim": ssim, "speedup": {"median": speedup}}


def test_the_best_point_is_the_fastest_that_was_measured_good_enough() -> None:
    records = [
        record(EAGER, 1.0, 9.0),
        record("ditfastattn-sites-ssim", 0.97, 1.5),
        record("ditfastattn-steps-ssim", 0.95, 2.0),
        record(FEWER, 0.99, 1.3),
        record("first-block", 0.96, 1.8),
        record("pyramid", 0.9, 3.0),
    ]
    found = best_at(records, "ssim", 0.95)
    ours, peer, fewer, ahead = (found[name] for name in ("ours", "peer", "fewer", "ahead"))
    assert ours
    assert (ours["method"], ours["speedup"]) == ("ditfastattn-steps-ssim", 2.0)
    assert peer
    assert peer["method"] == "first-block"
    assert fewer
    assert fewer["speedup"] == 1.3
    assert ahead == pytest.approx({"mean": -0.01, "standard_error": 0.0})
    none = {"ours": None, "peer": None, "fewer": None, "ahead": None}
    assert best_at(records, "ssim", 0.995) == none


def test_peers_and_models_are_named() -> None:
    assert [peer.name for peer in peers_named("pyramid,cache-dit")] == ["pyramid", "cache-dit"]
    assert peers_named("all") == PEERS
    assert peers_named("none") == ()
    assert not model_named("sd3-tiny").trained
    with pytest.raises(ConfigError, match="no such peer"):
        peers_named("pyramid,none")
    with pytest.raises(ConfigError, match="no such model"):
        model_named("unknown")


def test_the_command_checks_its_arguments(tmp_path: Path) -> None:
    arguments = ["bench", "--out", str(tmp_path), "--speedups", "some"]
    result = CliRunner().invoke(cli.app, arguments)
    assert isinstance(result.exception, ConfigError)
    assert CliRunner().invoke(cli.app, ["bench", "--repetitions", "3"]).exit_code == 2


@pytest.mark.parametrize(
    ("name", "billions", "tokens"),
    [
        ("dit-xl-512", 0.75, 1024),
        ("pixart-sigma-1k", 0.61, 4096),
        ("pixart-sigma-2k", 0.61, 16384),
        ("sd3", 2.03, 4096),
        ("flux", 11.9, 4096),
    ],
)
def test_random_models_are_of_the_published_sizes(name: str, billions: float, tokens: int) -> None:
    architecture = ARCHITECTURES[name]()
    with torch.device("meta"):
        transformer = architecture.make(**architecture.config)
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    assert parameters / 1e9 == pytest.approx(billions, rel=0.02)
    first, *_, last = architecture.shape
    packed = len(architecture.shape) == 2  # tokens and channels, else channels, height and width
    assert (first if packed else (last // 2) ** 2) == tokens
