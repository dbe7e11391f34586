"""What a search measures: local errors, effects on the image, prices."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from ditfastattn import CfgLayout, Strategy
from ditfastattn.passes.plan.strategies import strategies
from ditfastattn.passes.windows.window import TileWindow
from ditfastattn.runtime.pipeline.prompts import Prompt, split_prompts
from ditfastattn.runtime.search.measure import error_table as error_table_module
from ditfastattn.runtime.search.measure import latency
from ditfastattn.runtime.search.measure import profile as profile_module
from ditfastattn.runtime.search.measure.error_table import MAX_GAP, error_table
from ditfastattn.runtime.search.measure.latency import CostTable, Objective, measure_costs
from ditfastattn.runtime.search.measure.profile import Profiler
from ditfastattn.runtime.search.measure.sensitivity import probe_rows, probe_steps, site_weights
from ditfastattn.runtime.search.measure.session import Session, open_session
from ditfastattn.runtime.search.measure.site_evaluator import SiteEvaluator, greedy_candidates
from ditfastattn.runtime.search.measure.steppers import DenseStepper, PlanStepper, Variants
from ditfastattn.runtime.search.methods import Method
from ditfastattn.runtime.search.pass_chooser import PassChooser
from ditfastattn.runtime.search.record.checkpoint import Checkpoint
from ditfastattn.runtime.search.record.work import Work
from ditfastattn.runtime.search.solve.per_step import PerStepCalibrator, choose_row
from ditfastattn.runtime.search.solve.rows import Row
from tests.error_tables import GAP_PAIRS, LINE_GAPS, of, table_of
from tests.helpers import capture_every_site, randomize, tiny_digits_pipeline, tiny_dit

STEPS = 5
CALL: dict[str, Any] = {"class_labels": [1], "num_inference_steps": STEPS, "guidance_scale": 2.0}
PROMPT = Prompt(CALL, 0)
F = Strategy.FULL
SITES = 4  # two attentions, a feed-forward after each


def pipeline() -> Any:
    made = tiny_digits_pipeline(DDIMScheduler(clip_sample=False))
    randomize(made.transformer)
    return made


@pytest.fixture(scope="module")
def session() -> Any:
    with open_session(pipeline(), PROMPT) as opened:
        yield opened


@pytest.fixture(scope="module")
def attention_session() -> Any:
    with open_session(pipeline(), PROMPT, attention_only=True) as opened:
        yield opened


class Exact:
    """Run dense; with the caches of one step, attend by each strategy and compare in full."""

    def __init__(self, session: Session, source: int, kept: Strategy = F) -> None:
        self.kept = kept
        self.evaluator = SiteEvaluator(session.captured, session.sites, session.layout)
        self.layout = session.layout
        self.source = source
        self.errors: list[list[dict[Strategy, float]]] = []

    def step(self, args: Sequence[Tensor]) -> tuple[Any, ...]:
        evaluator = self.evaluator
        environment = evaluator.begin(args)
        row: list[dict[Strategy, float]] = []
        for index, site in enumerate(evaluator.sites):
            evaluator.advance(environment, index)
            output = evaluator.attend(environment, index, F)
            found: dict[Strategy, float] = {}
            if len(self.errors) > self.source:
                for strategy in greedy_candidates(site, self.layout):
                    attended = evaluator.attend(environment, index, strategy)
                    found[strategy] = float((attended - output).norm() / output.norm())
            row.append(found)
            evaluator.put(environment, index, output)
            if len(self.errors) == self.source:
                evaluator.remember(environment, index, self.kept if site.window else F)
        self.errors.append(row)
        return evaluator.finish(environment, len(row) - 1)


@pytest.fixture(params=[0, 1], ids=["bands", "tiles"])
def form(request: pytest.FixtureRequest, session: Session) -> Generator[int]:
    """Give the session's sites one form of window."""
    sites = session.sites
    forms = [replace(s, window=s.windows[request.param]) if s.windows else s for s in sites]
    assert isinstance(forms[0].window, TileWindow) == bool(request.param)
    session.take_sites(forms)
    yield request.param
    session.take_sites(sites)


@pytest.mark.parametrize("source", [0, 2])
def test_one_profile_gives_the_error_of_every_strategy_with_every_cache(
    session: Session, source: int, form: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def everything(tensor: Tensor, layout: CfgLayout) -> Tensor:
        return tensor.reshape(2, -1).float()

    monkeypatch.setattr(profile_module, "_sample", everything)  # no sampling: exact
    profiler, exact = Profiler(session), Exact(session, source)
    session.run(profiler, PROMPT)
    session.run(exact, PROMPT)
    table = error_table([profiler.sketch()], session.sites, session.layout, form)
    compared = 0
    for step, site in itertools.product(range(source + 1, STEPS), range(SITES)):
        for strategy, error in exact.errors[step][site].items():
            assert table.of(strategy, step, source, site) == pytest.approx(error, rel=1e-3)
            compared += 1
    assert compared == (STEPS - source - 1) * (2 * 4 + 2 * 2)  # a feed-forward has no window


def test_a_profile_gives_the_errors_after_a_shared_step_that_refreshes(
    session: Session, form: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_module, "_sample", lambda item, _: item.reshape(2, -1).float())
    profiler, exact = Profiler(session), Exact(session, 1, Strategy.SHARE_CFG_REFRESH)
    session.run(profiler, PROMPT)
    session.run(exact, PROMPT)
    table = error_table([profiler.sketch()], session.sites, session.layout, form)
    attention = [index for index, site in enumerate(session.sites) if site.window]
    for step, site in itertools.product(range(2, STEPS), attention):
        for strategy in (Strategy.WINDOW, Strategy.WINDOW_SHARE_CFG):
            error = exact.errors[step][site][strategy]
            assert table.of(strategy, step, STEPS + 1, site) == pytest.approx(error, rel=1e-3)
        full = table.of(Strategy.WINDOW, step, 1, site)
        assert table.of(Strategy.WINDOW, step, STEPS + 1, site) > 1.001 * full


def test_a_sample_is_close_to_the_whole(session: Session) -> None:
    profiler, exact = Profiler(session), Exact(session, 0)
    session.run(profiler, PROMPT)
    session.run(exact, PROMPT)
    table = error_table([profiler.sketch()], session.sites, session.layout)
    for step, site in itertools.product(range(1, STEPS), range(SITES)):
        error = exact.errors[step][site][Strategy.SHARE_STEP]
        assert table.of(Strategy.SHARE_STEP, step, 0, site) == pytest.approx(error, rel=0.2)


def test_the_error_of_a_line_through_any_two_outputs() -> None:
    rows = np.random.default_rng(0).random((9, 5))
    found = error_table_module._missed(rows, Strategy.EXTRAPOLATE, LINE_GAPS)
    assert np.isinf(found[:, :, 0]).all()
    for step, last, gap in itertools.product(range(9), range(9), range(1, MAX_GAP + 1)):
        if last < gap:
            assert np.isinf(found[step, last, gap])
            continue
        slope = (rows[last] - rows[last - gap]) / gap
        missed = rows[step] - (rows[last] + slope * (step - last))
        assert found[step, last, gap] == pytest.approx((missed**2).sum(), abs=1e-9)


@pytest.mark.parametrize("gaps", [*GAP_PAIRS, (1, 3), (4, 2)])
def test_the_error_of_a_parabola_through_any_three_outputs(gaps: tuple[int, int]) -> None:
    rows = np.random.default_rng(0).random((16, 5))
    found = error_table_module._missed(rows, Strategy.EXTRAPOLATE_QUADRATIC, [gaps])[:, :, 0]
    for step, last in itertools.product(range(16), range(16)):
        if last < sum(gaps):
            assert np.isinf(found[step, last])
            continue
        steps = np.array([last, last - gaps[0], last - sum(gaps)])
        curve = np.polynomial.Polynomial.fit  # another way to the same curve, element by element
        through = [curve(steps, rows[steps, i], 2)(step) for i in range(5)]
        missed = rows[step] - np.array(through)
        assert found[step, last] == pytest.approx((missed**2).sum(), rel=1e-6, abs=1e-9)


def test_what_is_smooth_is_nearer_to_a_parabola_than_to_a_line() -> None:
    time = torch.linspace(0.0, 1.0, 12)[:, None]
    outputs = (torch.sin(time + torch.arange(SITES) + 0.5) + time**2)[:, :, None, None].expand(
        -1, -1, 2, 4
    )
    sketch = profile_module.Sketch(outputs, torch.zeros(12, SITES, 1, 2, 4))
    _, sites = capture_every_site(tiny_dit())
    table = error_table([sketch], sites[:SITES], CfgLayout.COND_FIRST)
    line, parabola = Strategy.EXTRAPOLATE, Strategy.EXTRAPOLATE_QUADRATIC
    for step, gap in itertools.product(range(6, 12), (1, 2)):
        source = step - 1
        found = table.of(parabola, step, source, 0, (gap, gap))
        assert 0.0 < found < 0.5 * table.of(line, step, source, 0, (gap,))
    assert table.of(parabola, 5, 4, 0, (3, 3)) == np.inf  # reaches before the first step
    assert table.of(parabola, 11, 10, 0, (1, 2)) == np.inf  # not among the pairs
    assert table.of(parabola, 4, 6, 0, (1, 1)) == np.inf  # a later step's cache


def test_without_guidance_sharing_it_has_no_price(session: Session) -> None:
    sketch = profile_module.Sketch(torch.rand(4, SITES, 1, 8), torch.rand(4, SITES, 1, 1, 8))
    table = error_table([sketch], session.sites, CfgLayout.NONE)
    assert np.isinf(of(table, "share_cfg")).all()
    assert np.isinf(of(table, "window_share_cfg")).all()
    assert np.isfinite(of(table, "share_step")[3, 1]).all()
    assert np.isinf(of(table, "share_step")[1, 2]).all()  # a later step's cache


def test_an_effect_is_what_sharing_that_site_alone_does_to_the_output(session: Session) -> None:
    profiler = Profiler(session, probes=(2,))
    session.run(profiler, PROMPT)
    for site in range(SITES):
        rows: list[Row] = [(F,) * SITES] * STEPS
        rows[2] = tuple(Strategy.SHARE_STEP if i == site else F for i in range(SITES))
        dense, shared = DenseStepper(session), _Recording(PlanStepper(Variants(session), rows))
        session.run(dense, PROMPT)
        session.run(shared, PROMPT)
        conditional, unconditional = (shared.outputs[2] - dense.outputs[2]).chunk(2)
        guided = unconditional + 2.0 * (conditional - unconditional)
        expected = float(guided.square().mean())
        assert expected > 0.0
        assert profiler.effects[2][site] == pytest.approx(expected, rel=1e-3)


class _Recording:
    def __init__(self, stepper: PlanStepper) -> None:
        self._stepper = stepper
        self.outputs: list[Tensor] = []

    def step(self, args: Sequence[Tensor]) -> tuple[Any, ...]:
        results = self._stepper.step(args)
        self.outputs.append(results[0].clone())
        return results


def test_what_precedes_a_probe_is_replayed(session: Session) -> None:
    dense = DenseStepper(session)
    session.run(dense, PROMPT)
    rows = probe_rows(session, STEPS, 3)
    variants = Variants(session)
    whole = session.run(PlanStepper(variants, rows), PROMPT)
    replayed = session.run(PlanStepper(variants, rows, dense.outputs[:3]), PROMPT)
    assert torch.equal(whole, replayed)


def test_probes_cluster_at_the_end_and_at_the_start() -> None:
    assert probe_steps(20) == (1, 11, 17, 19)
    assert probe_steps(50) == (1, 23, 41, 47, 49)
    assert probe_steps(2) == (1,)


def test_weights_give_back_what_was_measured() -> None:
    steps = 10
    errors = np.random.default_rng(0).random((steps, steps, 2)) + 0.1
    lines = np.full((steps, steps, MAX_GAP + 1, 2), np.inf)
    parabolas = np.full((steps, steps, len(GAP_PAIRS), 2), np.inf)
    table = table_of(
        share_step=errors,
        window=errors,
        window_share_cfg=errors,
        share_cfg=errors[0],
        extrapolate=lines,
        extrapolate_quadratic=parabolas,
    )
    effects = {1: [1.0, 3.0], 7: [2.0, 2.0], 9: [5.0, 1.0]}
    damages = {1: 1e-6, 7: 1e-3, 9: 1e-2}
    weights = site_weights(table, effects, damages)
    for step, damage in damages.items():
        drift = weights[step] * of(table, "share_step")[step, step - 1]
        assert (drift**2).sum() == pytest.approx(damage)  # one step's errors add as energies
        assert drift[0] ** 2 / drift[1] ** 2 == pytest.approx(effects[step][0] / effects[step][1])
    assert weights.shape == (steps, 2)
    assert (weights[8] > np.minimum(weights[7], weights[9])).all()
    assert (weights[8] < np.maximum(weights[7], weights[9])).all()


def test_counted_prices_are_the_graphs_flops(session: Session, form: int) -> None:
    variants = Variants(session)
    costs = measure_costs(variants, Objective.ATTENTION_FLOPS)[form]
    share = Strategy.SHARE_STEP
    rows: list[Row] = [
        (F, F, F, F),
        (Strategy.WINDOW, F, share, share),
        (Strategy.SHARE_CFG, share, Strategy.WINDOW_SHARE_CFG, F),
        (F, F, Strategy.SHARE_CFG, F),
        (share, F, F, Strategy.SHARE_CFG),
        (Strategy.SHARE_CFG_REFRESH, F, Strategy.SHARE_CFG_REFRESH, F),  # both are read
        (Strategy.WINDOW, F, Strategy.WINDOW_SHARE_CFG, F),
    ]
    assert costs.plan(rows) == pytest.approx(variants.flops(rows).attention)


@pytest.mark.measured
def test_measured_prices_are_in_seconds_and_sharing_is_cheapest(session: Session) -> None:
    tables = measure_costs(Variants(session), Objective.LATENCY, repetitions=3)
    assert len(tables) == 3  # bands, tiles of the grid, tiles of the sequence
    for costs in tables:
        assert 0.0 < costs.step < 10.0
        for prices in costs.sites:
            assert set(prices) == set(strategies())
            assert min(prices.values()) >= 0.0


def prices(count: int) -> CostTable:
    each = {F: 4.0, Strategy.WINDOW: 2.0, Strategy.SHARE_CFG: 2.5, Strategy.SHARE_STEP: 0.0}
    each |= {Strategy.EXTRAPOLATE: 0.2, Strategy.EXTRAPOLATE_QUADRATIC: 0.3}
    each |= {Strategy.WINDOW_SHARE_CFG: 1.0, Strategy.SHARE_CFG_REFRESH: 2.75}
    return CostTable(10.0, (each,) * count, (0.5,) * count)


def test_noise_never_makes_reuse_dearer_than_what_does_more(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturbed(built: dict[Any, Any], *_: Any) -> dict[Any, float]:
        noise = {Strategy.FULL.name: 9.0, Strategy.SHARE_STEP.name: 8.0, "extrapolate": 7.0}
        return {row: noise.get(row[1], 5.0) for row in built} | {("all", "share-step"): 1.0}

    monkeypatch.setattr(latency, "_time", disturbed)
    for priced in measure_costs(Variants(session), Objective.LATENCY)[0].sites:
        assert priced[Strategy.SHARE_STEP] == priced[Strategy.EXTRAPOLATE] == min(priced.values())
        assert priced[Strategy.FULL] > 0.0


def test_storing_a_residual_is_charged_once_per_full_step() -> None:
    costs = prices(1)
    window = Strategy.WINDOW
    assert costs.plan([(F,), (F,)]) == 20.0
    assert costs.plan([(F,), (window,)]) == 10.0 + 0.5 + 8.0
    assert costs.plan([(F,), (window,), (window,)]) == 10.0 + 0.5 + 16.0
    rows: list[Row] = [(F,), (F,), (window,)]
    assert costs.plan(rows) == 20.0 + 0.5 + 8.0  # the first full step's residual is not read
    assert costs.plan(rows, merge_variants=True) == 20.0 + 1.0 + 8.0  # one variant: both store
    rows = [(F,), (Strategy.SHARE_CFG_REFRESH,), (window,)]
    assert costs.plan(rows) == 10.0 + 8.75 + 8.0  # the full step's is not read; the price has it


@pytest.mark.parametrize("seed", range(5))
def test_the_integer_program_of_a_step_finds_the_best_row(seed: int) -> None:
    random = np.random.default_rng(seed)
    shortcuts = [strategy for strategy in strategies() if strategy is not F]
    errors = [{strategy: float(random.random()) for strategy in shortcuts} for _ in range(3)]
    costs, budget = prices(3), 0.7

    def saved(row: Sequence[Strategy]) -> float:
        spent = sum(errors[i].get(strategy, 0.0) for i, strategy in enumerate(row))
        total = sum(costs.sites[i][F] - costs.sites[i][s] for i, s in enumerate(row))
        return total if spent <= budget else -1.0

    best = max(itertools.product(strategies(), repeat=3), key=saved)
    assert saved(choose_row(errors, costs, budget)) == pytest.approx(saved(best))
    assert choose_row(errors, costs, 0.0) == (F, F, F)
    assert choose_row([{}, {}], prices(2), 1.0) == (F, F)


def test_a_pass_follows_its_own_choices(attention_session: Session) -> None:
    calibrator = PerStepCalibrator(attention_session, prices(2), budget=0.05)
    images = attention_session.run(calibrator, PROMPT)
    stepper = PlanStepper(Variants(attention_session), calibrator.strategies)
    planned = attention_session.run(stepper, PROMPT)
    assert {entry for row in calibrator.strategies for entry in row} != {F}
    assert float((images - planned).abs().max()) < 1e-5


@pytest.mark.parametrize("method", [Method.GREEDY, Method.PER_STEP])
def test_an_interrupted_pass_resumes(
    session: Session, method: Method, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Prompt({**CALL, "class_labels": [1, 2]}, 0)

    def chooser() -> PassChooser:
        work = Work(session, Checkpoint(tmp_path), 0.0)
        return PassChooser(work, batch, prices(2), method, 0.1)

    whole = chooser().rows(0.1)
    (kept,) = tmp_path.glob("*pass*.json")
    kept.write_text(str([list(map(str, row)) for row in whole[:3]]).replace("'", '"'))
    assert chooser().rows(0.1) == whole
    kept.unlink()
    assert chooser().rows(0.1) == whole


def test_lists_of_a_call_are_prompts() -> None:
    call = {"prompt": ["a", "b"], "negative_prompt": ["c", "d"], "height": 64}
    first, second = split_prompts(call, 7)
    assert first == Prompt({"prompt": ["a"], "negative_prompt": ["c"], "height": 64}, 7)
    assert second.seed == 8
    assert split_prompts({"prompt": "a"}, 0) == [Prompt({"prompt": "a"}, 0)]
