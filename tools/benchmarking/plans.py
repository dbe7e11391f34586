"""A deep model with random weights, and plans for it and for the demo; nothing is compiled."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.plan.calibration import Calibration
from ditfastattn.passes.plan.legality import why_not
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search.measure.session import open_session
from ditfastattn.runtime.search.measure.steppers import DenseStepper
from ditfastattn.runtime.search.record.record_plan import record_plan
from ditfastattn.tools.digits_pipeline import DigitsPipeline

FOUR = (Strategy.FULL, Strategy.SHARE_STEP, Strategy.WINDOW, Strategy.SHARE_CFG)
# How often each strategy is drawn; the later steps of a plan share more than this.
WEIGHTS = {
    Strategy.FULL: 2,
    Strategy.WINDOW: 3,
    Strategy.SHARE_STEP: 4,
    Strategy.SHARE_CFG: 2,
    Strategy.WINDOW_SHARE_CFG: 3,
    Strategy.EXTRAPOLATE: 4,
}


def make_pipeline(layers: int) -> DigitsPipeline:
    """Return a pipeline of a DiT with 256 tokens and 4 heads of 32; it is deterministic."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=layers,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=10,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    scheduler: Any = DDIMScheduler(clip_sample=False)  # not the enumeration diffusers declares
    pipeline = DigitsPipeline(model.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)  # type: ignore[no-untyped-call]  # diffusers
    return pipeline


def make_rows(sites: Sequence[Site], steps: int, variants: int) -> list[tuple[Strategy, ...]]:
    """Return a full first row, then ``variants - 1`` random rows, each repeated over some steps."""
    random_ = random.Random(0)
    rows = [(Strategy.FULL,) * len(sites)]
    computed = [1] * len(sites)

    def draw(index: int) -> Strategy:
        legal = [
            strategy
            for strategy in WEIGHTS
            if not why_not(strategy, sites[index]) and computed[index] >= strategy.outputs_read
        ]
        return random_.choices(legal, [WEIGHTS[strategy] for strategy in legal])[0]

    of_step = [step * (variants - 1) // (steps - 1) for step in range(steps - 1)]
    for _, repeated in groupby(of_step):
        row = tuple(map(draw, range(len(sites))))
        for _ in repeated:
            rows.append(row)
            computed = [n + s.computes for n, s in zip(computed, row, strict=True)]
    return rows


def make_plan(pipeline: DigitsPipeline, prompt: Prompt, variants: int) -> Plan:
    """Return a plan of ``variants`` distinct steps for ``pipeline``.

    Layers take turns with the windows that fit them.
    """
    with open_session(pipeline, prompt) as session:
        session.run(DenseStepper(session), prompt)
        turns = [
            replace(site, window=site.windows[place % len(site.windows)]) if site.windows else site
            for place, site in enumerate(session.sites)
        ]
        session.take_sites(turns)
        rows = make_rows(session.sites, session.steps, variants)
        calibration = Calibration(method="manual")
        return record_plan(session, rows, session.timesteps, calibration, merge_variants=True)


def four_variants(pipeline: Any, call: Mapping[str, Any]) -> Plan:
    """Return a plan in which four distinct steps take turns."""
    prompt = Prompt(call, 0)
    with open_session(pipeline, prompt) as session:
        session.run(DenseStepper(session), prompt)
        rows = [
            tuple(
                Strategy.FULL if why_not(FOUR[step % 4], site) else FOUR[step % 4]
                for site in session.sites
            )
            for step in range(session.steps)
        ]
        calibration = Calibration(method="manual")
        return record_plan(session, rows, session.timesteps, calibration, merge_variants=True)
