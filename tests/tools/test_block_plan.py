"""Ranges of blocks as plans: written by a user, equal to the caching methods that skip the same."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

import ditfastattn
from ditfastattn import ConfigError, Strategy, Target
from ditfastattn.runtime.pipeline.prompts import generate
from ditfastattn.tools.bench.forms import Form, peer_contender
from ditfastattn.tools.bench.models import BenchModel, model_named
from ditfastattn.tools.bench.peers import peers_named
from ditfastattn.tools.bench.peers.base import Setting
from ditfastattn.tools.block_plan import Column, Span, block_plan
from tests.tools.test_bench import PROMPTS, STEPS, TINY, tiny_pipeline

ALWAYS = Setting("skips whenever it may", {"threshold": 1e9})
TWO_OF_THREE = Setting(
    "two of three", {"threshold": 1e9, "max_skip_steps": 2, "retention_ratio": 0.0}
)


def column(runs: Sequence[int], otherwise: str = "share-step") -> Column:
    return ["full" if step in runs else otherwise for step in range(STEPS)]


JOINT = pytest.mark.slow  # the same for other models


@pytest.mark.parametrize(
    ("model", "name", "setting", "span", "runs"),
    [
        (TINY, "first-block", ALWAYS, (1, -1), (0,)),  # the first block, which decides, runs
        (TINY, "mag-cache", TWO_OF_THREE, (0, -1), (0, 3, 6)),
        pytest.param("sd3-tiny", "mag-cache", TWO_OF_THREE, (0, -1), (0, 3, 6), marks=JOINT),
        pytest.param("flux-tiny", "first-block", ALWAYS, (1, -1), (0,), marks=JOINT),
    ],
)
def test_a_plan_does_what_a_method_that_skips_blocks_does(
    model: BenchModel | str, name: str, setting: Setting, span: Span, runs: tuple[int, ...]
) -> None:
    given = model_named(model) if isinstance(model, str) else model
    pipeline, prompts = given.open(), given.test_prompts(2, STEPS)
    pipeline.set_progress_bar_config(disable=True)
    (peer,) = peers_named(name)
    ratios = [1.0] * STEPS  # of MagCache: the residual never changes
    method = peer_contender(given, pipeline, prompts, STEPS, peer, setting, Form.EAGER, ratios)
    expected = method.by_prompt()
    dense = [generate(pipeline, prompt) for prompt in prompts]
    plan = block_plan(pipeline, prompts[0].call, {span: column(runs)})
    ditfastattn.accelerate(pipeline, plan, lowering="eager")
    for prompt, theirs, plain in zip(prompts, expected, dense, strict=True):
        assert float((theirs - plain).abs().max()) > 1e-3
        assert float((generate(pipeline, prompt) - theirs).abs().max()) < 1e-4
    ditfastattn.restore(pipeline)


def test_a_plan_is_retargeted_to_other_steps() -> None:
    pipeline = tiny_pipeline()
    plan = block_plan(pipeline, PROMPTS[0].call, {(0, 0): column((0, 1, 4, 7), "extrapolate")})
    other = dict(PROMPTS[0].call) | {"num_inference_steps": 5}
    adapted = ditfastattn.retarget(pipeline, plan, other, target=Target.min_psnr(1.0))
    assert [str(row[-1]) for row in adapted.strategies] == [
        *("full", "full", "extrapolate", "extrapolate", "full")
    ]
    assert set(adapted.strategies[1]) == {Strategy.FULL}  # a line needs two: its blocks run


@pytest.mark.parametrize(
    ("ranges", "reason"),
    [
        ({(1, -1): column((1,))}, "at step 0(.|\n)*no earlier step computes an output"),
        ({(1, -1): column((0,), "extrapolate")}, "at step 1(.|\n)*only 1 of them compute one"),
        ({(1, -1): column((0,), "window")}, "a window is defined for attention"),
        ({(1, -1): column((0,), "share-cfg")}, "streams of their own"),
        ({(1, -1): column((0,), "fitted-1")}, "the model's whole output alone"),
        ({(1, -1): ["full"]}, "expected: 8"),
        ({(1, 2): column((0,))}, r"blocks 1 to 2 are no range(.|\n)*0: transformer_blocks.0.attn1"),
        ({(1, 0): column((0,))}, "comes after"),
        ({(0, 1): column((0,)), (-2, -1): column((0,))}, "is listed twice"),
    ],
)
def test_what_no_range_can_do_is_refused(ranges: dict[Span, Column], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        block_plan(tiny_pipeline(), PROMPTS[0].call, ranges)
