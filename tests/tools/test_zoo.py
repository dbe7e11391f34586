"""The compiler takes diffusers' transformers without a line for any of them."""

from __future__ import annotations

import pytest

from ditfastattn.passes.plan import SiteKind, Strategy
from ditfastattn.tools import survey
from ditfastattn.tools.zoo import ZOO
from ditfastattn.tools.zoo.trial import TOLERANCE, try_model

NAMED = {  # the families people ask for, and the kinds of attention that each has
    "DiTTransformer2DModel": {SiteKind.SELF},
}
MODELS = {model.name: model for model in ZOO}


@pytest.mark.parametrize("name", NAMED)
def test_a_mixed_plan_is_the_interpreters(name: str) -> None:
    trial = try_model(MODELS[name])
    assert trial.error <= TOLERANCE
    attentions = set(trial.kinds) - {SiteKind.FEED_FORWARD}
    assert attentions == NAMED[name]
    assert Strategy.SHARE_STEP in trial.legal


def test_every_exported_class_is_tried_or_named() -> None:
    assert set(MODELS) <= set(survey.exported_classes())
