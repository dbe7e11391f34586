"""Searches on tiny models: every target, every method, every refusal."""

from __future__ import annotations

import logging
import multiprocessing
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ditfastattn import ConfigError, Plan, Strategy, Target, TargetMissedError, calibrate
from ditfastattn.passes.analysis.site import SiteKind
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.strategies import strategies
from ditfastattn.runtime.pipeline.prompts import split_prompts
from ditfastattn.runtime.search import site_search
from ditfastattn.runtime.search.judge.judgement import Judgement, metric_values
from ditfastattn.runtime.search.judge.targets import TargetKind
from ditfastattn.runtime.search.measure.latency import CostTable
from ditfastattn.runtime.search.measure.session import open_session
from ditfastattn.runtime.search.measure.steppers import DenseStepper, PlanStepper, Variants
from ditfastattn.runtime.search.measure.timing import PairedTiming, summarize
from ditfastattn.runtime.search.options import SearchOptions
from ditfastattn.runtime.search.record.checkpoint import Checkpoint, open_checkpoint
from ditfastattn.runtime.search.record.work import SearchProgress, Work
from ditfastattn.runtime.search.search import Search
from tests.helpers import attentive_pipeline

CALL: dict[str, Any] = {"class_labels": [1, 2], "num_inference_steps": 6, "guidance_scale": 2.0}
HELD_OUT: dict[str, Any] = {**CALL, "class_labels": [3, 4, 5]}


LONGER: dict[str, Any] = {**CALL, "num_inference_steps": 16}


def search(target: Target, **options: Any) -> Plan:
    """Search sites by counted operations, so that two searches find the same plan."""
    given: dict[str, Any] = {"objective": "attention-flops", "lowering": "eager"}
    given["held_out"] = HELD_OUT
    if target.kind is TargetKind.QUALITY:
        given["method"] = "global"
    given |= options
    return calibrate(attentive_pipeline(), CALL, target=target, **given)


def images(plan: Plan, call: dict[str, Any], seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return dense and planned images of the prompts of ``call``, run again."""
    prompts = split_prompts(call, seed)
    with open_session(attentive_pipeline(), prompts[0]) as session:
        variants = Variants(session)
        return [
            (
                session.run(DenseStepper(session), prompt),
                session.run(PlanStepper(variants, plan.strategies), prompt),
            )
            for prompt in prompts
        ]


@pytest.fixture(scope="module")
def by_ssim() -> Plan:
    return search(Target.min_ssim(0.99))


def test_the_worst_prompt_meets_the_target_when_run_again(by_ssim: Plan) -> None:
    target = Target.min_ssim(0.99)
    found = by_ssim.calibration
    assert by_ssim.changed > 0
    assert found.method == "global"
    assert found.predicted_speedup is not None
    assert found.predicted_speedup > 1.05
    for measured, call, seed in ((found.calibrated, CALL, 0), (found.held_out, HELD_OUT, 500)):
        values = [metric_values(target, d, p, call)[0] for d, p in images(by_ssim, call, seed)]
        assert measured is not None
        assert measured.worst == pytest.approx(min(values), abs=1e-4)
        assert measured.mean == pytest.approx(sum(values) / len(values), abs=1e-4)
        assert min(values) >= 0.99


def test_the_record_names_target_prompts_and_sampler(by_ssim: Plan) -> None:
    found = by_ssim.calibration
    assert found.target is not None
    assert (found.target.name, found.target.bound, found.target.at_least) == ("ssim", 0.99, True)
    assert (found.seed, found.batch) == (0, 2)
    assert found.held_out is not None
    assert found.held_out.prompts == 3
    assert found.rounds <= 6
    assert found.device
    assert by_ssim.sampler.cfg_layout is CfgLayout.COND_FIRST
    assert len(by_ssim.sampler.timesteps) == 6
    assert Plan.parse(by_ssim.model_dump_json()) == by_ssim


def test_a_search_is_reproducible(by_ssim: Plan) -> None:
    again = search(Target.min_ssim(0.99))
    assert again.strategies == by_ssim.strategies
    assert again.calibration.calibrated == by_ssim.calibration.calibrated


def test_a_stricter_target_saves_less(by_ssim: Plan) -> None:
    strict = search(Target.min_ssim(0.999)).calibration.predicted_speedup
    loose = by_ssim.calibration.predicted_speedup
    assert strict is not None
    assert loose is not None
    assert 1.0 <= strict < loose


def mean_difference(dense: Tensor, planned: Tensor) -> Tensor:
    return (dense - planned).abs().flatten(1).mean(1)


def minus_difference(dense: Tensor, planned: Tensor) -> Tensor:
    error = mean_difference(dense, planned)
    return torch.where(error > 0, -error.log(), torch.inf)  # not finite for equal images


@pytest.mark.parametrize(
    "target",
    [
        Target.min_psnr(30.0),
        Target.quality(mean_difference, at_most=0.01),
        Target.quality(minus_difference, at_least=4.6, name="closeness"),
    ],
    ids=lambda target: target.name,
)
def test_other_qualities_are_reached(target: Target) -> None:
    plan = search(target)
    assert plan.changed > 0
    assert plan.calibration.held_out is not None
    assert target.met_by(plan.calibration.held_out.worst)
    values = [metric_values(target, d, p, HELD_OUT)[0] for d, p in images(plan, HELD_OUT, 500)]
    assert target.met_by(target.worst(values))


@pytest.mark.parametrize("method", ["per-step", pytest.param("greedy", marks=pytest.mark.slow)])
def test_the_other_methods_reach_a_quality_too(method: str) -> None:
    plan = search(Target.min_ssim(0.99), method=method)
    assert plan.calibration.method == method
    assert plan.calibration.held_out is not None
    assert plan.calibration.held_out.worst >= 0.99
    assert plan.changed > 0


def test_a_threshold_is_the_papers_search_unless_told_otherwise() -> None:
    greedy = search(Target.threshold(0.2))
    assert (greedy.calibration.method, greedy.calibration.strength) == ("greedy", 0.2)
    per_step = search(Target.threshold(0.05), method="per-step")
    assert per_step.calibration.method == "per-step"
    with pytest.raises(ConfigError, match="the global search has none"):
        search(Target.threshold(0.2), method="global")


def timing(dense: float, planned: float) -> PairedTiming:
    one = summarize([dense, dense]), summarize([planned, planned])
    return PairedTiming(*one, summarize([dense / planned] * 2))


def test_a_speed_is_measured_and_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def slow(_pipeline: Any, plan: Plan, *_args: Any) -> PairedTiming:
        predicted = plan.calibration.predicted_speedup
        assert predicted is not None
        seen.append(predicted)
        return timing(1.0, 1.0 / (1.0 + 0.7 * (predicted - 1.0)))  # less than predicted

    monkeypatch.setattr(site_search, "measure_speed", slow)
    plan = search(Target.min_speedup(1.3))
    assert len(seen) >= 2
    assert seen[0] == pytest.approx(1.3, rel=0.25)
    assert plan.calibration.measured_speedup is not None
    assert plan.calibration.measured_speedup >= 1.3
    assert plan.calibration.predicted_speedup == seen[-1] > seen[0]


def test_a_latency_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def exact(_pipeline: Any, plan: Plan, *_args: Any) -> PairedTiming:
        assert plan.calibration.predicted_speedup is not None
        return timing(2.0, 2.0 / plan.calibration.predicted_speedup)

    monkeypatch.setattr(site_search, "measure_speed", exact)
    plan = search(Target.max_latency(1.5))
    assert plan.calibration.measured_seconds is not None
    assert plan.calibration.measured_seconds <= 1.5
    already = search(Target.max_latency(5.0))
    assert already.changed == 0


def test_a_speed_out_of_reach_is_a_missed_target(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(site_search, "measure_speed", lambda *_: timing(1.0, 0.9))
    with pytest.raises(TargetMissedError, match=r"no plan is fast enough[\s\S]*1\.11x"):
        search(Target.min_speedup(3.0), out=tmp_path / "plan.json")
    assert not (tmp_path / "plan.json").exists()


def test_speed_is_really_measured_on_the_compiled_plan() -> None:
    plan = search(Target.max_latency(60.0))
    assert plan.calibration.measured_seconds is not None
    assert 0.0 < plan.calibration.measured_seconds < 60.0


@pytest.mark.parametrize("most", [1, 2])
def test_variants_are_capped(by_ssim: Plan, most: int) -> None:
    plan = search(Target.min_ssim(0.99), max_variants=most)
    prompts = split_prompts(CALL, 0)
    with open_session(attentive_pipeline(), prompts[0]) as session:
        program = Variants(session).programs(plan.strategies, plan.merge_variants)[0]
        free = Variants(session).programs(by_ssim.strategies, False)[0]
    assert len(program.variants) <= most < len(free.variants)
    assert plan.calibration.predicted_speedup is not None
    assert by_ssim.calibration.predicted_speedup is not None
    assert plan.calibration.predicted_speedup <= by_ssim.calibration.predicted_speedup + 1e-9
    assert (plan.changed > 0) == (most > 1)  # a single variant can only be dense
    assert plan.calibration.held_out is not None
    assert plan.calibration.held_out.worst >= 0.99


def test_feed_forwards_are_shared_too_and_memory_is_bounded() -> None:
    free = search(Target.min_ssim(0.99), objective="flops")
    shared = {
        site.kind
        for index, site in enumerate(free.sites)
        if any(row[index] != Strategy.FULL for row in free.strategies)
    }
    assert SiteKind.FEED_FORWARD in shared
    bound = free.calibration.cache_bytes / 2
    capped = search(Target.min_ssim(0.99), objective="flops", max_cache_mb=bound / 2**20)
    assert capped.calibration.cache_bytes <= bound
    assert capped.changed > 0
    assert capped.calibration.predicted_speedup is not None
    assert free.calibration.predicted_speedup is not None
    assert capped.calibration.predicted_speedup <= free.calibration.predicted_speedup
    narrow = search(Target.min_ssim(0.99), objective="flops", attention_only=True)
    assert {site.kind for site in narrow.sites} == {SiteKind.SELF}


class Attention:
    """Attend uniformly, or sharply by scores that any change of the input upsets."""

    def __init__(self, random: bool) -> None:
        self.sharpness = 3.0 if random else 0.0

    def __call__(self, attn: Any, hidden_states: Tensor, **_: Any) -> Tensor:
        def heads(tokens: Tensor) -> Tensor:
            batch, count, _ = tokens.shape
            return tokens.view(batch, count, attn.heads, -1).transpose(1, 2)

        query = self.sharpness * torch.sin(1e4 * attn.to_q(hidden_states))
        key = self.sharpness * torch.sin(1e4 * attn.to_k(hidden_states))
        value = heads(5.0 * attn.to_v(hidden_states))
        output = scaled_dot_product_attention(heads(query), heads(key), value)
        projected: Tensor = attn.to_out[0](output.transpose(1, 2).flatten(2))
        return projected


@pytest.mark.parametrize("random", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_non_redundant_attention_stays_full_and_is_reported(
    random: bool, caplog: pytest.LogCaptureFixture
) -> None:
    made = attentive_pipeline()
    blocks: Any = made.transformer.transformer_blocks
    for block in blocks:
        block.attn1.set_processor(Attention(random))
    options: dict[str, Any] = {"target": Target.min_psnr(70.0), "objective": "flops"}
    options["method"] = "global"
    options["held_out"] = {**LONGER, "class_labels": HELD_OUT["class_labels"]}
    with caplog.at_level(logging.WARNING, logger="ditfastattn"):
        plan = calibrate(made, LONGER, attention_only=True, **options)
    entries = len(plan.sites) * plan.sampler.steps
    if random:
        assert plan.changed <= 0.04 * entries
    else:  # the same model with attention that changes smoothly
        assert plan.changed >= 0.06 * entries
    assert ("there was nothing to gain" in caplog.text) == random
    assert Plan.parse(plan.model_dump_json()) == plan  # an infinite PSNR too


def test_progress_estimates_beforehand_and_stays_within() -> None:
    seen: list[SearchProgress] = []
    search(Target.min_ssim(0.99), on_progress=seen.append)
    assert seen[0].done == 0.0
    assert seen[0].seconds_left > 0.0
    assert seen[-1].done <= seen[0].at_most
    assert seen[0].expected < 0.7 * seen[0].at_most
    assert all(item.done <= item.expected for item in seen)
    assert [item.done for item in seen] == sorted(item.done for item in seen)
    assert {"probing how much each step matters", "round 1: the held-out prompts"} <= {
        item.phase for item in seen
    }


FOUR: dict[str, Any] = {**CALL, "class_labels": [1, 2, 6, 7]}


def all_or_nothing(dense: Tensor, planned: Tensor) -> Tensor:
    """Hide how far a plan is from the bound."""
    return (mean_difference(dense, planned) < 0.004).float()


@pytest.mark.parametrize(
    "target",
    [
        Target.min_ssim(0.99),
        Target.min_psnr(35.0),
        Target.quality(all_or_nothing, at_least=1.0),
    ],
    ids=lambda target: target.name,
)
def test_a_round_costs_at_most_four_dense_generations(target: Target) -> None:
    """With four calibration prompts; held-out prompts are generated once a plan is accepted."""
    begun: dict[str, float] = {}

    def note(progress: SearchProgress) -> None:
        begun.setdefault(progress.phase, progress.done)

    options: dict[str, Any] = {"objective": "attention-flops", "held_out": HELD_OUT}
    options["method"] = "global"
    plan = calibrate(attentive_pipeline(), FOUR, target=target, on_progress=note, **options)
    begun["the end"] = plan.calibration.forwards
    ends = dict(zip(begun, list(begun.values())[1:], strict=False))
    rounds = [phase for phase in begun if phase.endswith("the calibration prompts")]
    assert 1 <= len(rounds) == plan.calibration.rounds <= 6
    for phase in rounds:
        assert 0.0 < ends[phase] - begun[phase] < 4 * CALL["num_inference_steps"]


class Gate:
    """Judge the images of some dense images more harshly than all others."""

    def __init__(self, harsh_on: list[Tensor], harshness: float) -> None:
        self.harsh_on, self.harshness = harsh_on, harshness

    def __call__(self, dense: Tensor, planned: Tensor) -> Tensor:
        harsh = any(torch.equal(dense, known) for known in self.harsh_on)
        return mean_difference(dense, planned) * (self.harshness if harsh else 1.0)


def test_unseen_prompts_that_are_harder_make_the_plan_gentler() -> None:
    free = search(Target.quality(mean_difference, at_most=0.01))
    unseen = images(free, HELD_OUT, 500)
    refused = 0.02 / float(mean_difference(*unseen[0]))  # twice what is allowed, on one prompt
    target = Target.quality(Gate([unseen[0][0]], refused), at_most=0.01)
    gated = search(target)
    assert gated.changed > 0
    assert gated.calibration.rounds > 1
    assert gated.calibration.strength < free.calibration.strength
    values = [metric_values(target, d, p, HELD_OUT)[0] for d, p in images(gated, HELD_OUT, 500)]
    assert max(values) <= 0.01
    assert gated.calibration.held_out is not None
    assert gated.calibration.held_out.worst == pytest.approx(max(values), abs=1e-5)


def test_a_metric_is_told_the_prompt_and_may_ask_more_of_some() -> None:
    def strict_on_two(dense: Tensor, planned: Tensor, call: dict[str, Any]) -> Tensor:
        return mean_difference(dense, planned) * (20.0 if call["class_labels"] == [2] else 1.0)

    alike = search(Target.quality(mean_difference, at_most=0.01))
    plan = search(Target.quality(strict_on_two, at_most=0.01))
    values = [float(mean_difference(*pair)) for pair in images(plan, CALL, 0)]
    assert values[1] <= 0.0005 < values[0]
    assert 0.0 < plan.calibration.strength < alike.calibration.strength


def test_where_no_plan_meets_the_target_on_unseen_prompts_the_model_stays_dense(
    by_ssim: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    unseen = [dense for dense, _ in images(by_ssim, HELD_OUT, 500)]
    with caplog.at_level(logging.WARNING, logger="ditfastattn"):
        plan = search(Target.quality(Gate(unseen, 1e9), at_most=0.01))
    assert plan.changed == 0
    assert plan.calibration.rounds <= 6
    assert "there was nothing to gain" in caplog.text


def test_prompts_without_any_damage_do_not_decide_for_harder_ones() -> None:
    """The calibration prompts show none at all, and unseen ones miss the target."""
    free = search(Target.quality(mean_difference, at_most=0.01))
    seen = [dense for dense, _ in images(free, CALL, 0)]
    unseen = images(free, HELD_OUT, 500)
    refused = 0.02 / float(mean_difference(*unseen[0]))

    def judge(dense: Tensor, planned: Tensor) -> Tensor:
        if any(torch.equal(dense, known) for known in seen):
            return torch.zeros(len(dense))
        return mean_difference(dense, planned) * refused

    target = Target.quality(judge, at_most=0.01)
    plan = search(target)
    values = [metric_values(target, d, p, HELD_OUT)[0] for d, p in images(plan, HELD_OUT, 500)]
    assert max(values) <= 0.01


class Sites:
    """Choose how many of ten sites share a step, in proportion to the strength."""

    first, order, tries = 0.45, 2.0, 60

    def __init__(self, predicts: bool, step: float) -> None:
        prices = dict.fromkeys(strategies(), 1.0) | {Strategy.SHARE_STEP: 0.0}
        self.costs = CostTable(step, (prices,) * 10, (0.0,) * 10)
        self.predicts = predicts

    def rows(self, strength: float) -> list[tuple[Strategy, ...]]:
        shared = min(10, round(10 * strength))
        row = (Strategy.SHARE_STEP,) * shared + (Strategy.FULL,) * (10 - shared)
        return [(Strategy.FULL,) * 10, row]


@pytest.mark.parametrize(
    ("predicts", "step", "goes_on"),
    [
        (True, 100.0, False),  # sites are little of a step: stronger plans are hardly faster
        (True, 10.0, True),  # sites are all of a step
        (False, 100.0, True),  # only a pass would show how fast a stronger plan is
    ],
)
def test_a_round_is_spent_where_a_faster_plan_is_in_sight(
    monkeypatch: pytest.MonkeyPatch, predicts: bool, step: float, goes_on: bool
) -> None:
    def damage(self: Work, group: str, index: int, rows: Any, *rest: Any) -> list[Judgement]:
        shared = rows[1].count(Strategy.SHARE_STEP) / 10
        return [Judgement(value=1.0 - shared**2, damage=shared**2, allowed=0.4)]

    monkeypatch.setattr(Work, "judge", damage)
    target = Target.min_ssim(0.6)
    prompts = split_prompts(CALL, 0)
    with open_session(attentive_pipeline(), prompts[0]) as session:
        work, sites = Work(session, Checkpoint(), 0.0), Sites(predicts, step)
        found = Search(work, sites, SearchOptions(target), prompts, prompts).quality()
    assert (found.rounds > 1) == goes_on
    assert min(found.held_out) >= 0.6


def hold(out: Path, held: Event) -> None:
    with open_checkpoint(out):
        held.set()
        time.sleep(600)


def test_two_writers_are_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    processes = multiprocessing.get_context("fork")
    held = processes.Event()
    other = processes.Process(target=hold, args=(out, held))
    other.start()
    try:
        assert held.wait(60)
        with pytest.raises(ConfigError, match="another search is writing this plan"):
            search(Target.min_ssim(0.99), out=out)
        assert not out.exists()
    finally:
        other.kill()  # a lock that outlived its process would block the plan for good
        other.join()
    with open_checkpoint(out):
        pass


def interrupt_in_round_1(out: Path) -> None:
    def stop(progress: SearchProgress) -> None:
        if progress.phase.startswith("round 1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(Target.min_ssim(0.99), out=out, on_progress=stop)


def test_an_unfinished_search_with_other_arguments_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    interrupt_in_round_1(out)
    kept = sorted(path.name for path in (tmp_path / "plan.json.search").iterdir())
    assert "profile-0.safetensors" in kept
    with pytest.raises(ConfigError, match=r"target: an unfinished search[\s\S]*--restart"):
        search(Target.min_ssim(0.9), out=out)
    plan = search(Target.min_ssim(0.9), out=out, restart=True)
    assert Plan.load(out) == plan
    assert not (tmp_path / "plan.json.search").exists()


def test_a_resumed_search_reads_what_was_done(tmp_path: Path, by_ssim: Plan) -> None:
    out = tmp_path / "plan.json"
    interrupt_in_round_1(out)
    damaged = tmp_path / "plan.json.search" / "profile-0.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])  # it is measured again
    phases: list[SearchProgress] = []
    plan = search(Target.min_ssim(0.99), out=out, on_progress=phases.append)
    assert plan.strategies == by_ssim.strategies
    assert plan.sampler == by_ssim.sampler
    assert plan.calibration.forwards < by_ssim.calibration.forwards


def test_a_dense_model_below_the_bound_is_reported() -> None:
    def brightness(_dense: Tensor, planned: Tensor) -> Tensor:
        return planned.flatten(1).mean(1)

    with pytest.raises(TargetMissedError, match="even the dense model misses the target"):
        search(Target.quality(brightness, at_least=0.999))


def test_lpips_without_its_weights_is_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"(?i)lpips|torchvision"):
        search(Target.max_lpips(0.1))


@pytest.mark.parametrize(
    ("call", "options", "message"),
    [
        ({"class_labels": [1, 2], "num_inference_steps": 6}, {"max_variants": -1}, "capped"),
        ({**CALL}, {"max_variants": 2, "method": "greedy"}, "capped"),
        ({**CALL}, {"max_cache_mb": 1.0, "method": "per-step"}, r"max_cache_mb[\s\S]*capped"),
        ({**CALL, "other": [1]}, {}, "one entry per image"),
    ],
)
def test_bad_arguments_are_refused(
    call: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        calibrate(attentive_pipeline(), call, target=Target.min_ssim(0.9), **options)


def test_full_rows_are_dense_to_the_bit() -> None:
    prompts = split_prompts(CALL, 0)
    with open_session(attentive_pipeline(), prompts[0]) as session:
        rows = [(Strategy.FULL,) * len(session.sites)] * 6
        dense = session.run(DenseStepper(session), prompts[0])
        planned = session.run(PlanStepper(Variants(session), rows), prompts[0])
    assert torch.equal(dense, planned)
