"""Plans of the tiny pipeline of digits, captured and called as it is."""

from __future__ import annotations

import pytest

from ditfastattn import Plan
from tests.helpers import attentive_pipeline
from tests.plans import opaque_plan_for, plan_for
from tests.three_steps import CALL, STRATEGIES


@pytest.fixture(scope="module")
def captured() -> Plan:
    return plan_for(attentive_pipeline(), CALL, STRATEGIES)


@pytest.fixture(scope="module")
def opaque() -> Plan:
    return opaque_plan_for(attentive_pipeline(), CALL, STRATEGIES)


@pytest.fixture(params=["captured", "opaque"])
def plan(request: pytest.FixtureRequest) -> Plan:
    made: Plan = request.getfixturevalue(request.param)
    return made
