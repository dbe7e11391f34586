"""Every example runs from its first line to its last, on a tiny pipeline saved to a folder."""

from __future__ import annotations

import functools
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import ditfastattn
from ditfastattn import Plan
from tests.tiers import slow_but
from tests.tiny_pipelines import TINY_PIPELINES

EXAMPLES = Path(__file__).parent.parent / "examples"
CASES: dict[str, tuple[str, str, dict[str, Any], int]] = {  # and how many images it writes
    "dit": ("class_to_image", "dit", {"classes": "1,2"}, 2),
    "pixart": ("text_to_image", "pixart", {}, 4),
    "sd3": ("text_to_image", "sd3", {}, 4),
    "flux": ("text_to_image", "flux", {}, 4),
    "cogvideox": ("text_to_video", "cogvideox", {}, 2 * 9),
    "ltx": ("text_to_video", "ltx", {}, 2 * 5),
    "wan": ("text_to_video", "wan", {}, 2 * 5),
}
ONE_PER_EXAMPLE = ("dit", "pixart", "wan")


def run_example(case: str, folder: Path) -> None:
    example, name, given, images = CASES[case]
    build, call = TINY_PIPELINES[name]
    build().save_pretrained(folder / "pipeline")
    torch._dynamo.reset()
    if example != "class_to_image":
        given = {"call": json.dumps({key: call[key] for key in call if key != "prompt"})}
    main = runpy.run_path(str(EXAMPLES / f"{example}.py"))["main"]
    out = folder / "out"
    main(pipeline=str(folder / "pipeline"), steps=4, min_ssim=0.05, out=out, **given)
    assert Plan.load(out / "plan.json").changed > 0
    assert len(list(out.glob("*.png"))) == images


def test_every_example_is_run() -> None:
    run = {example for example, *_ in CASES.values()}
    by_its_own_tests = {
        "whole_steps",
        "run_bundle",
    }  # compared with the runtime wherever whole steps are tested
    assert run | by_its_own_tests == {path.stem for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("case", slow_but(ONE_PER_EXAMPLE, CASES))
def test_an_example_runs_uncompiled(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = functools.partial(ditfastattn.accelerate, lowering="eager")
    monkeypatch.setattr(ditfastattn, "accelerate", eager)
    run_example(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", ONE_PER_EXAMPLE)
def test_an_example_runs_as_it_stands(case: str, tmp_path: Path) -> None:
    run_example(case, tmp_path)
