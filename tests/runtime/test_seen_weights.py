"""What is compared of weights as a generation begins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ditfastattn.passes.analysis.fingerprint import SAMPLES
from ditfastattn.runtime.options import WeightsCheck
from ditfastattn.runtime.seen_weights import SeenWeights

CHECKED = [WeightsCheck.SAMPLED, WeightsCheck.FULL]
DTYPES = [
    *(torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn),
    *(torch.complex64, torch.complex128, torch.int8, torch.bool),
]


def weights() -> list[Tensor]:
    return [torch.ones(3, 5).to(dtype) for dtype in DTYPES] + [torch.ones(())]


@pytest.mark.parametrize("check", CHECKED)
@pytest.mark.parametrize("place", range(len(DTYPES) + 1))
def test_another_value_is_seen_whatever_the_dtype(check: WeightsCheck, place: int) -> None:
    seen, now = SeenWeights(weights(), check), weights()
    assert seen.equal(now)
    now[place].view(-1)[-1:].copy_(torch.zeros(1).to(now[place].dtype))
    assert not seen.equal(now)


@pytest.mark.parametrize("check", CHECKED)
def test_what_is_not_a_number_equals_itself(check: WeightsCheck) -> None:
    given = [torch.full((4,), torch.nan)]
    assert SeenWeights(given, check).equal([item.clone() for item in given])


@pytest.mark.parametrize("check", CHECKED)
def test_other_shapes_dtypes_and_numbers_of_tensors_differ(check: WeightsCheck) -> None:
    seen = SeenWeights([torch.zeros(2, 3)], check)
    for other in ([torch.zeros(3, 2)], [torch.zeros(2, 3).int()], [], [torch.zeros(2, 3)] * 2):
        assert not seen.equal(other)


def test_a_sample_covers_what_a_fingerprint_does_and_the_hash_covers_all() -> None:
    given = [torch.zeros(2 * SAMPLES)]
    seen = {check: SeenWeights(given, check) for check in WeightsCheck}
    given[0][1] = 1.0
    assert {check: seen[check].equal(given) for check in WeightsCheck} == {
        WeightsCheck.SAMPLED: True,
        WeightsCheck.FULL: False,
        WeightsCheck.NEVER: True,
    }
    given[0][2] = 1.0
    assert not seen[WeightsCheck.SAMPLED].equal(given)


def test_what_was_seen_is_a_copy() -> None:
    given = [torch.zeros(4), torch.zeros(3)]
    seen = SeenWeights(given, WeightsCheck.SAMPLED)
    given[0].data.copy_(torch.ones(4))
    assert not seen.equal(given)
    alone = [torch.zeros(4)]
    seen = SeenWeights(alone, WeightsCheck.SAMPLED)
    alone[0].data.copy_(torch.ones(4))
    assert not seen.equal(alone)
