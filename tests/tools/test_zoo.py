"""The compiler takes diffusers' transformers without a line for any of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from ditfastattn import accelerate
from ditfastattn.core.errors import ConfigError
from ditfastattn.export import prepare
from ditfastattn.export.batch import FIX_BATCH
from ditfastattn.export.capture_call import RecordedCall, capture_call
from ditfastattn.passes.analysis.site import SiteKind
from ditfastattn.passes.analysis.sites import SiteReport, find_sites
from ditfastattn.passes.plan.legality import why_not
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.tools import survey, survey_page
from ditfastattn.tools.zoo import FAMILIES, ZOO, families
from ditfastattn.tools.zoo.base import ZooModel
from ditfastattn.tools.zoo.trial import (
    BATCH,
    TOLERANCE,
    Trial,
    count_graph_breaks,
    first_tensor,
    relative_error,
    try_model,
)
from tests.tiers import slow_but

SELF, CROSS, JOINT = SiteKind.SELF, SiteKind.CROSS, SiteKind.JOINT
NAMED = {  # the families people ask for, and the kinds of attention that each has
    "AuraFlowTransformer2DModel": {JOINT},
    "CogVideoXTransformer3DModel": {JOINT},
    "CogView4Transformer2DModel": {JOINT},
    "DiTTransformer2DModel": {SELF},
    "Flux2Transformer2DModel": {JOINT},
    "FluxTransformer2DModel": {JOINT},
    "HunyuanDiT2DModel": {SELF, CROSS},
    "HunyuanVideoTransformer3DModel": {JOINT},
    "LTXVideoTransformer3DModel": {SELF, CROSS},
    "LatteTransformer3DModel": {SELF, CROSS},
    "PixArtTransformer2DModel": {SELF, CROSS},
    "QwenImageTransformer2DModel": {JOINT},
    "SD3Transformer2DModel": {JOINT, SELF},
    "SanaTransformer2DModel": {CROSS},
    "WanTransformer3DModel": {SELF, CROSS},
}
TRACED = {  # Dynamo breaks them: what their attention is, and what they read of their inputs
    "BriaFibo2Transformer2DModel": (JOINT, "tolist() of encoder_attention_mask"),
    "GlmImageTransformer2DModel": (JOINT, "nonzero() of prior_token_drop"),
    "HiDreamImageTransformer2DModel": (JOINT, ""),
    "HunyuanVideo15Transformer3DModel": (JOINT, "item() of image_embeds"),
    "HunyuanVideoFramepackTransformer3DModel": (JOINT, "item() of encoder_attention_mask"),
    "Lumina2Transformer2DModel": (SELF, "tolist() of encoder_attention_mask"),
    "MochiTransformer3DModel": (JOINT, "nonzero() of encoder_attention_mask"),
    "NucleusMoEImageTransformer2DModel": (JOINT, ""),
    "OmniGenTransformer2DModel": (SELF, "item() of position_ids"),
    "QwenImage21Transformer2DModel": (SELF, "repeat_interleave() of img_mask"),
    "ZImageTransformer2DModel": (SELF, ""),
}
MODELS = {model.name: model for model in ZOO}
QUICK = {"DiTTransformer2DModel", "PixArtTransformer2DModel"}  # tried by default
MASKED = (  # text is padded, and a mask hides the padding from every query
    "BriaFiboTransformer2DModel",
    "HunyuanImageTransformer2DModel",
    "HunyuanVideoTransformer3DModel",
    "Krea2Transformer2DModel",
    "QwenImageTransformer2DModel",
)
GRIDS = {  # of tokens that are packed outside of the model
    "LTXVideoTransformer3DModel": (3, 4, 4),
    "QwenImageTransformer2DModel": (4, 4),
}
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
CURRENT = PAGE.read_text().startswith(survey_page.head())


@functools.cache
def sites_of(name: str) -> SiteReport:
    """Return what ``try_model`` finds in the graph before it compiles anything."""
    torch._dynamo.reset()
    zoo = MODELS[name]
    call = RecordedCall(zoo.call(BATCH, zoo.timesteps[0]))
    return find_sites(capture_call(zoo.build(0), call).graph)


@pytest.mark.parametrize("name", slow_but(QUICK, NAMED))
def test_a_mixed_plan_is_the_interpreters(name: str) -> None:
    trial = try_model(MODELS[name], program=True)
    assert trial.error <= TOLERANCE
    assert not trial.no_program  # torch.export finds the same sites, and takes the same plan
    assert trial.program_error is not None
    assert trial.program_error <= TOLERANCE
    attentions = set(trial.kinds) - {SiteKind.FEED_FORWARD}
    assert attentions == NAMED[name]
    assert Strategy.SHARE_STEP in trial.legal
    if CURRENT:
        assert documented(name) == columns(survey.row(survey.Outcome(name, trial)))


def documented(name: str) -> list[str]:
    (line,) = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| {name} |")]
    return columns(line)


def columns(row: str) -> list[str]:
    """Return what the table says of a class, but for breaks and errors."""
    return row.split(" | ")[:4]


@pytest.mark.parametrize("name", slow_but({"QwenImageTransformer2DModel"}, MASKED))
def test_windows_hide_the_keys_that_the_model_masks(name: str) -> None:
    trial = try_model(MODELS[name], seed=1)  # whose plans have windows
    joint = [site for site in trial.report.sites if site.kind is JOINT]
    assert joint
    assert all(site.windows for site in joint)
    windowed = [s for row in trial.rows for s in row if s.windowed]
    assert windowed
    assert trial.error <= TOLERANCE


@pytest.mark.parametrize("name", GRIDS)
def test_packed_tokens_have_the_grid_of_their_positions(name: str) -> None:
    report = sites_of(name)
    assert {site.grid for site in report.sites if site.windows} == {GRIDS[name]}
    assert not any(site.no_grid for site in report.sites if site.windows)


def test_positions_that_are_an_input_are_named() -> None:
    report = sites_of("FluxTransformer2DModel")
    reasons = {site.no_grid for site in report.sites if site.windows}
    (reason,) = reasons
    assert "flattens no grid into its tokens" in reason
    assert reason.endswith("unknown: img_ids")


def test_windows_stand_beside_the_text_and_linear_attention_is_named() -> None:
    (site, *_) = [s for s in sites_of("FluxTransformer2DModel").sites if s.kind is JOINT]
    assert site.text == (8, 0)
    assert site.window == 2
    assert not why_not(Strategy.WINDOW, site)
    reasons = {item.reason for item in sites_of("SanaTransformer2DModel").declined}
    assert any("linear attention" in reason for reason in reasons)


def test_space_and_time_are_told_apart_and_share_guidance() -> None:
    report = sites_of("LatteTransformer3DModel")
    attentions = [site for site in report.sites if site.kind is SELF]
    assert [site.axes for site in attentions] == ["space", "time"] * (len(attentions) // 2)
    assert all(not why_not(Strategy.SHARE_CFG, site) for site in report.sites)
    joint = sites_of("CogVideoXTransformer3DModel")
    assert {site.axes for site in joint.sites if site.kind is JOINT} == {"time and space"}


@pytest.mark.parametrize("name", slow_but({"OmniGenTransformer2DModel"}, TRACED))
def test_a_class_that_breaks_dynamo_is_traced_and_runs_a_mixed_plan(name: str) -> None:
    kind, read = TRACED[name]
    trial = try_model(MODELS[name])
    assert trial.error <= TOLERANCE
    assert kind in trial.kinds
    assert Strategy.SHARE_STEP in trial.legal
    assert any(found.startswith(read) for found in trial.guards) or not read
    assert dense_error(MODELS[name], trial) <= TOLERANCE
    if CURRENT:
        assert documented(name) == columns(survey.row(survey.Outcome(name, trial)))


def dense_error(zoo: ZooModel, trial: Trial) -> float:
    """Return how far an accelerated model is from the dense one by a plan that computes all."""
    model, twin = zoo.build(), zoo.build()
    calls = [zoo.call(BATCH, timestep) for timestep in zoo.timesteps]
    assert trial.plan is not None
    full = ((Strategy.FULL,) * len(trial.rows[0]),) * len(calls)
    plan = trial.plan.model_copy(update={"strategies": full})
    accelerate(Pipeline(model), plan, timestep=zoo.argument, lowering="eager")
    with torch.no_grad():
        found = [first_tensor(model(**call)) for call in calls]
        expected = [first_tensor(twin(**call)) for call in calls]
    return relative_error(found, expected)


class Pipeline:
    """The least that is accelerated."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        self.transformer = transformer


def test_dynamo_alone_refuses_what_depends_on_content_and_names_the_way_out() -> None:
    zoo = MODELS["MochiTransformer3DModel"]
    torch._dynamo.reset()
    compiled: Any = torch.compile(zoo.build(), backend="ditfastattn", fullgraph=True)
    with (
        torch.no_grad(),
        pytest.raises(ConfigError, match=r"the content of its inputs[\s\S]*accelerate\(pipeline\)"),
    ):
        compiled(**zoo.call(BATCH, zoo.timesteps[0]))


@pytest.mark.skipif(not CURRENT, reason="other releases than the page's, or another survey")
def test_every_exported_class_is_tried_and_stands_in_the_table() -> None:
    exported = survey.exported_classes()
    assert set(exported) - set(MODELS) == {"TransformerTemporalModel"}  # of Latte's predecessor
    first_table = PAGE.read_text().partition("\n| ")[2].partition("\n\n")[0]
    rows = [line for line in first_table.splitlines() if line.startswith("| ")]
    assert [row.split(" ")[1] for row in rows] == exported


def test_every_family_stands_in_the_tuple() -> None:
    folder = Path(families.__file__).parent
    files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(FAMILIES) == len(files)
    assert all(FAMILIES)
    assert len(MODELS) == len(ZOO)  # no class twice


class Doubling(torch.nn.Module):
    """Double the sum of its inputs, and break the graph up to twice on the way."""

    def __init__(self, breaks: int) -> None:
        super().__init__()
        self.breaks = breaks

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x + timestep
        if self.breaks > 0:
            torch._dynamo.graph_break()
            x = x - timestep
        if self.breaks > 1:
            torch._dynamo.graph_break()
        return 2 * x


def call_doubling(batch: int, timestep: float) -> dict[str, Any]:
    return {"x": torch.ones(batch, 3), "timestep": torch.full((batch, 1), timestep)}


class Watching(Doubling):
    """Read what is denoised."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        if x.sum() > 1e9:
            raise ValueError
        return super().forward(x, timestep)


@dataclass(frozen=True)
class Handmade(ZooModel):
    breaks: int = 0
    made: type[Doubling] = Doubling

    def build(self, seed: int = 0) -> torch.nn.Module:
        return self.made(self.breaks)


@pytest.mark.parametrize("breaks", [0, 1, 2])
def test_graph_breaks_are_counted(breaks: int) -> None:
    assert count_graph_breaks(Handmade("Doubling", {}, call_doubling, breaks=breaks)) == breaks


def test_a_model_that_is_not_captured_stands_in_the_row_with_its_reason() -> None:
    zoo = Handmade("Doubling", {}, call_doubling, made=Watching)
    outcome = survey._outcome("Doubling", zoo, False)
    assert survey.row(outcome) == "| Doubling | - | - | - | 1 | - | - | - |"
    assert not survey.entry(outcome).works
    assert survey.notes(outcome) == [outcome.reason]
    assert "depends on what it denoises" in outcome.reason
    assert "test_zoo.py:" in outcome.reason


@pytest.mark.slow  # that such models are refused is tested by default
def test_a_class_whose_batch_cannot_be_free_is_exported_at_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: object) -> None:
        raise ConfigError("made for one batch", remedy=FIX_BATCH)

    monkeypatch.setattr(prepare, "capture_doubled", refused)
    trial = try_model(MODELS["DiTTransformer2DModel"], onnx=True)
    assert (trial.no_onnx, trial.fixed_batch) == ("", "made for one batch")
    assert trial.onnx_error is not None
    assert trial.onnx_error <= TOLERANCE
    notes = survey.notes(survey.Outcome("DiTTransformer2DModel", trial))
    assert "ONNX at a fixed batch: made for one batch" in notes


@pytest.mark.parametrize(
    ("row", "notes", "unexplained"),
    [
        ("| A | 2 self | 1 | wsce | 0 | 2e-07 | 0e+00 | 0e+00 |", (), []),
        ("| A | 2 self | 1 | wsce | 0 | 2e-07 | 0e+00 | - |", ("declined: a",), ["ONNX"]),
        ("| A | 2 self | 1 | wsce | 0 | 2e-07 | - | 0e+00 |", (), ["torch.export"]),
        ("| A | 2 self | 1 | wsce | 0 | 2e-07 | - | - |", ("no ONNX: a",), ["torch.export"]),
        ("| A | - | 1 | - | - | 2e-07 | 0e+00 | 0e+00 |", ("declined: a",), ["graph breaks"]),
        ("| A | - | 0 | - | 0 | - | - | - |", ("it is no denoiser",), []),
    ],
)
def test_a_column_without_a_result_has_its_reason(
    row: str, notes: tuple[str, ...], unexplained: list[str]
) -> None:
    entry = survey_page.Entry(row, notes)
    assert entry.unexplained == unexplained
    if unexplained:
        with pytest.raises(ConfigError, match=f"A: [\\s\\S]*a note on {unexplained[0]}"):
            survey_page.as_markdown({"A": entry})


@pytest.mark.skipif(not CURRENT, reason="other releases than the page's, or another survey")
def test_every_column_of_the_page_without_a_result_has_its_reason() -> None:
    entries = survey_page.read_page(PAGE)
    assert {name: found.unexplained for name, found in entries.items() if found.unexplained} == {}


def test_a_page_is_read_back_and_other_rows_stay(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    entries = {
        "A": survey_page.Entry(
            "| A | 2 self | 1 | wsce | 0 | 2e-07 | 0e+00 | - |", ("no ONNX: a reason",)
        ),
        "B": survey_page.Entry("| B | - | - | - | 3 | - | - |", ("one (of two)", "two: the other")),
        "C": survey_page.Entry("| C | 2 joint | 1 | se | 0 | 2e-03 | 0e+00 |"),
    }
    page.write_text(survey_page.as_markdown(entries, "| a pipeline | yes |\n"))
    assert survey_page.read_page(page) == entries
    assert survey_page.rows_of_pipelines(page.read_text()) == "| a pipeline | yes |\n"
    assert "1 of 3 classes run a plan" in page.read_text()
    page.write_text(page.read_text().replace(diffusers.__version__, "0.0.1"))
    with pytest.raises(ConfigError, match="the page was written with other releases"):
        survey_page.read_page(page)
