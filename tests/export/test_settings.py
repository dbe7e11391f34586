"""A bundle is called with the numbers, texts and flags that it was exported with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditfastattn
from ditfastattn import ConfigError
from ditfastattn.export.bundle import export_model
from ditfastattn.export.capture_call import RecordedCall
from ditfastattn.export.options import ExportOptions
from tests.helpers import noise


class Settings(nn.Module):
    """Sizes come apart from the tokens, one for each image; so do a scale and a mode."""

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        sizes: list[tuple[int, int]],
        scale: float = 1.0,
        options: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        high, wide = sizes[0]
        places = 10 * torch.arange(high)[:, None] + torch.arange(wide)
        sign = -1.0 if (options or {}).get("mode") == "inverse" else 1.0
        return (sign * scale * hidden_states + places.flatten() + timestep[:, None],)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("settings") / "bundle"
    call = RecordedCall({**given(), "sizes": [(2, 3)] * 2, "options": {"mode": "inverse"}})
    export_model(Settings(), call, None, folder, ExportOptions(golden=False))
    return ditfastattn.load(folder)


def given(rows: int = 2) -> dict[str, Any]:
    return {"hidden_states": noise(1, rows, 6), "timestep": torch.full((rows,), 0.5)}


@pytest.mark.parametrize(
    "rest",
    [
        {"sizes": [(2, 3)] * 4, "options": {"mode": "inverse"}},
        {"sizes": [[2, 3]] * 4, "scale": 1, "options": None, "return_dict": False},
        {},
    ],
)
def test_the_same_values_are_taken(bundle: Any, rest: dict[str, Any]) -> None:
    """For more images too, and with what is left out as it was exported."""
    call = given(4)
    same = {"sizes": [(2, 3)] * 4, "options": {"mode": "inverse"}}
    (found,) = (
        bundle(**call, **rest, return_dict=False)
        if "return_dict" not in rest
        else bundle(**call, **rest)
    )
    torch.testing.assert_close(found, Settings()(**call, **same)[0])


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ({"sizes": [(3, 2)] * 2}, r"'sizes\.0\.0'[\s\S]*got: +3[\s\S]*expected: 2"),
        ({"sizes": [(2, 3), (2, 3), (3, 2)]}, r"'sizes\.2\.0'"),
        ({"scale": 0.5}, r"'scale'[\s\S]*got: +0\.5[\s\S]*expected: 1\.0"),
        ({"options": {"mode": "plain"}}, r"'options\.mode'[\s\S]*export a bundle for this call"),
        ({"options": {"strength": 2}}, r"'options\.strength'[\s\S]*expected: none"),
        ({"scale": float("nan")}, "'scale'"),
    ],
)
def test_other_values_are_refused(bundle: Any, rest: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bundle(**given(), **rest)
