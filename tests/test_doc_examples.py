"""The Python in README and docs/ runs, page by page, with a tiny pipeline in the user's place.

A block that cannot run here is marked, right above it, with the reason::

    <!-- not run: needs a GPU -->
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

import ditfastattn
from ditfastattn import Plan, Strategy, Target
from ditfastattn.passes.plan.calibration import Measured
from ditfastattn.runtime import lowering
from ditfastattn.tools import digits_pipeline
from ditfastattn.tools.digits_pipeline import DigitsPipeline
from tests.helpers import tiny_digits_pipeline
from tests.plans import plan_for
from tests.test_docs import PAGES

_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*) -->\n+)?^```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
_MARK = re.compile(r"not run: (?P<reason>\S.*)")
STEPS = 20  # as the pages say


@dataclass(frozen=True)
class Example:
    """A block of Python; ``mark`` is the comment right above it, or ""."""

    page: str
    line: int
    code: str
    mark: str


def examples(page: Path) -> list[Example]:
    text = page.read_text(encoding="utf-8")
    return [
        Example(
            page.name, text.count("\n", 0, found.start("code")), found["code"], found["mark"] or ""
        )
        for found in _BLOCK.finditer(text)
    ]


EXAMPLES = {page.name: examples(page) for page in PAGES if examples(page)}


class PromptedDigits(DigitsPipeline):
    """Draw a digit for each prompt, as a text-to-image pipeline is called."""

    def __call__(
        self,
        prompt: Any,
        guidance_scale: float = 2.0,
        num_inference_steps: int = STEPS,
        generator: Any = None,
        output_type: Any = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Take a text, several, or the digits themselves."""
        asked = [prompt] if isinstance(prompt, str) else prompt
        labels = [len(each) % 10 if isinstance(each, str) else each for each in asked]
        return super().__call__(
            labels, guidance_scale, num_inference_steps, generator, output_type, return_dict
        )


def tiny_pipeline() -> Any:
    tiny = tiny_digits_pipeline(DDIMScheduler(clip_sample=False))
    made = PromptedDigits(tiny.transformer, tiny.scheduler)
    made.set_progress_bar_config(disable=True)  # type: ignore[no-untyped-call]  # diffusers
    return made


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Return a plan of 20 steps that was measured on held-out prompts."""
    call = {"prompt": ["a cat"], "num_inference_steps": STEPS}
    strategies = [Strategy.FULL, Strategy.SHARE_STEP] * (STEPS // 2)
    made = plan_for(tiny_pipeline(), call, strategies, Target.min_ssim(0.9))
    measured = Measured(prompts=2, mean=0.999, worst=0.99)
    found = made.calibration.model_copy(update={"held_out": measured})
    return made.model_copy(update={"calibration": found})


def uncompiled(module: Any, _args: Any, _inductor: Any) -> Callable[..., Any]:
    module.recompile()
    return lambda *inputs: module(*inputs)


@pytest.fixture
def user(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the names that pages take for granted; the files they name are in the folder."""
    pipeline = tiny_pipeline()
    monkeypatch.chdir(tmp_path)
    for name in ("plan.json", "plan-20.json", "plan-30.json"):
        plan.save(tmp_path / name)
    monkeypatch.setattr(lowering, "_compile", uncompiled)
    monkeypatch.setattr(lowering, "_compiled", {})  # these are not for other tests
    monkeypatch.setattr(digits_pipeline, "embedded_pipeline", tiny_pipeline)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda _: pipeline)
    return {
        "ditfastattn": ditfastattn,
        "torch": torch,
        "pipeline": pipeline,
        "plan": plan,
        "model": pipeline.transformer,
        "scheduler": pipeline.scheduler,
        "guidance_scale": 2.0,
        "prompts": ["a lighthouse", "a red car"],
        "other_prompts": ["a crowd"],
        "call": {"prompt": ["a cat"], "num_inference_steps": STEPS},
        "noise": torch.randn(1, 1, 16, 16),
        "labels": torch.tensor([3, 10]),  # with the null class
        "reads": lambda image, asked: True,
    }


MODEL_CALL = {  # of the page about models without a pipeline
    "hidden_states": torch.zeros(2, 1, 16, 16),
    "timestep": torch.zeros(2, dtype=torch.long),
    "class_labels": torch.tensor([3, 10]),
}


@pytest.mark.slow
@pytest.mark.parametrize("page", EXAMPLES)
def test_the_examples_of_a_page_run(page: str, user: dict[str, Any]) -> None:
    torch._dynamo.reset()
    if page == "own-model.md":
        user["call"] = MODEL_CALL
    for example in EXAMPLES[page]:
        if not example.mark:
            code = compile("\n" * example.line + example.code, page, "exec")
            exec(code, user)
        if page != "quickstart.md":  # each block begins with the pipeline as it was
            ditfastattn.restore(user["pipeline"])


def test_what_is_not_run_says_why() -> None:
    marked = [each for found in EXAMPLES.values() for each in found if each.mark]
    assert marked  # the marks are found
    for each in marked:
        reason = _MARK.fullmatch(each.mark)
        assert reason is not None, f"{each.page}: {each.mark}"
        assert len(reason["reason"].split()) >= 3, f"{each.page}: {each.mark}"


def test_most_examples_run() -> None:
    found = [each for page in EXAMPLES.values() for each in page]
    assert sum(not each.mark for each in found) >= 0.7 * len(found)
    every = sum(page.read_text(encoding="utf-8").count("```python\n") for page in PAGES)
    assert len(found) == every
