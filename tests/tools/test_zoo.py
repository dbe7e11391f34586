"""The compiler takes diffusers' transformers without a line for any of them."""

from __future__ import annotations

import pytest

from ditfastattn.passes.plan import SiteKind, Strategy
from ditfastattn.tools import survey
from ditfastattn.tools.zoo import ZOO
from ditfastattn.tools.zoo.trial import TOLERANCE, try_model

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
REFUSED = {  # and what stands in the way
    "Lumina2Transformer2DModel": "data-dependent expression",
    "MochiTransformer3DModel": "depend on the content of its inputs",
    "OmniGenTransformer2DModel": "Data-dependent branching",
    "ZImageTransformer2DModel": "Unsupported context manager",
}
MODELS = {model.name: model for model in ZOO}


@pytest.mark.parametrize("name", NAMED)
def test_a_mixed_plan_is_the_interpreters(name: str) -> None:
    trial = try_model(MODELS[name], program=True)
    assert trial.error <= TOLERANCE
    assert not trial.no_program  # torch.export finds the same sites, and takes the same plan
    assert trial.program_error is not None
    assert trial.program_error <= TOLERANCE
    attentions = set(trial.kinds) - {SiteKind.FEED_FORWARD}
    assert attentions == NAMED[name]
    assert Strategy.SHARE_STEP in trial.legal


def test_windows_stand_beside_the_text_and_linear_attention_is_named() -> None:
    trial = try_model(MODELS["FluxTransformer2DModel"])
    (site, *_) = [site for site in trial.report.sites if site.kind is JOINT]
    assert site.text == (8, 0)
    assert site.window == 2
    assert Strategy.WINDOW in trial.legal
    reasons = {item.reason for item in try_model(MODELS["SanaTransformer2DModel"]).report.declined}
    assert any("linear attention" in reason for reason in reasons)


def test_space_and_time_are_told_apart_and_share_guidance() -> None:
    report = try_model(MODELS["LatteTransformer3DModel"]).report
    attentions = [site for site in report.sites if site.kind is SELF]
    assert [site.axes for site in attentions] == ["space", "time"] * (len(attentions) // 2)
    assert all(not site.declined.get(Strategy.SHARE_CFG) for site in report.sites)
    joint = try_model(MODELS["CogVideoXTransformer3DModel"]).report
    assert {site.axes for site in joint.sites if site.kind is JOINT} == {"time and space"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_graph_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(Exception, match=REFUSED[name]):
        try_model(MODELS[name])


def test_every_exported_class_is_tried_or_named() -> None:
    assert set(MODELS) <= set(survey.exported_classes())
