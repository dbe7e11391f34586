"""The batch of an exported graph is free where a model computes the same at each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
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

TIMES = torch.tensor([0.3, 0.3])


class KeysAndValues(nn.Module):
    def forward(
        self, hidden_states: Tensor, keys: Tensor, values: Tensor, timestep: Tensor
    ) -> Tensor:
        return hidden_states + keys.sin() * values.cos() + timestep[:, None]


class ScaledLayers(nn.Module):
    """Two layers, each of which has a scale: as many as there are rows, by chance."""

    def forward(self, hidden_states: Tensor, scales: Tensor, timestep: Tensor) -> Tensor:
        one, other = scales.softmax(0)
        made: Tensor = hidden_states.sin() * one + hidden_states.cos() * other
        return made + timestep[:, None]


class RowsOfSizes(nn.Module):
    """The size of each row's image comes apart from the rows: one size serves all of them."""

    def forward(
        self, hidden_states: Tensor, sizes: list[tuple[int, int]], timestep: Tensor
    ) -> Tensor:
        high, wide = sizes[0]
        if sizes != [sizes[0]] * len(hidden_states):
            raise ValueError("a size is missing")
        places = torch.arange(high)[:, None] + torch.arange(wide)
        return hidden_states + places.flatten() + timestep[:, None]


class ByNumber(nn.Module):
    def forward(self, hidden_states: Tensor, caches: dict[int, Tensor], timestep: Tensor) -> Tensor:
        return hidden_states + caches[0] * caches[1] + timestep[:, None]


class OneSize(nn.Module):
    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        if len(hidden_states) != 2:
            raise ValueError("made for two")
        return hidden_states + timestep[:, None]


def exported(model: nn.Module, more: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Export ``model`` for two rows; return the arguments."""
    given = {"hidden_states": noise(1, 2, 6), "timestep": TIMES, **more}
    export_model(model, RecordedCall(given), None, folder, ExportOptions(golden=False))
    return given


@pytest.mark.parametrize(
    ("model", "rows", "shared"),
    [
        (KeysAndValues(), dict.fromkeys(("keys", "values"), noise(2, 2, 6)), {}),
        (ScaledLayers(), {}, {"scales": torch.tensor([0.5, 2.0])}),
        (RowsOfSizes(), {"sizes": [(2, 3), (2, 3)]}, {}),
        (ByNumber(), {"caches": {0: noise(2, 2, 6), 1: noise(3, 2, 6)}}, {}),
    ],
    ids=lambda item: type(item).__name__,
)
def test_a_bundle_takes_another_batch(
    model: nn.Module, rows: Mapping[str, Any], shared: Mapping[str, Any], tmp_path: Path
) -> None:
    given = exported(model, {**rows, **shared}, tmp_path / "bundle")
    bundle = ditfastattn.load(tmp_path / "bundle")
    torch.testing.assert_close(bundle(**given)[0], model(**given), atol=1e-5, rtol=0)
    three = {name: item if name in shared else _with_another(item) for name, item in given.items()}
    torch.testing.assert_close(bundle(**three)[0], model(**three), atol=1e-5, rtol=0)


def _with_another(rows: Any) -> Any:
    if isinstance(rows, dict):
        return {key: _with_another(item) for key, item in rows.items()}
    return torch.cat([rows, rows[:1] + 1]) if isinstance(rows, Tensor) else [*rows, rows[0]]


def test_a_model_for_one_batch_is_refused_with_what_it_said(tmp_path: Path) -> None:
    refused = r"does not take twice the batch[\s\S]*made for two[\s\S]*--fixed-batch"
    with pytest.raises(ConfigError, match=refused):
        exported(OneSize(), {}, tmp_path / "bundle")


class Scaled(nn.Module):
    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return hidden_states + (timestep * 1.0)[:, None]


class RowByRow(nn.Module):
    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return torch.stack([row.sin() for row in hidden_states]) + timestep[:, None]


def test_a_timestep_that_is_expanded_leaves_the_batch_free(tmp_path: Path) -> None:
    exported(Scaled(), {"timestep": torch.tensor(7.0).expand(2)}, tmp_path / "bundle")
    given = {"hidden_states": noise(1, 5, 6), "timestep": torch.arange(5.0)}
    found = ditfastattn.load(tmp_path / "bundle")(**given)[0]
    torch.testing.assert_close(found, Scaled()(**given))


@pytest.mark.parametrize(
    "tensor",
    [
        noise(1, 2, 3, 4),
        noise(1, 2, 4, 3).mT,
        noise(1, 3, 2, 4).transpose(0, 1),
        torch.tensor(3.0).expand(2),
        noise(1, 1, 4).expand(2, 4),
    ],
    ids=lambda item: f"{list(item.shape)}-{item.stride()}",
)
def test_a_doubled_call_has_the_layouts_of_the_call(tensor: Tensor) -> None:
    found = RecordedCall({"x": tensor}).doubled().arguments["x"]
    assert torch.equal(found, torch.cat([tensor, tensor]))
    order = sorted(range(tensor.dim()), key=tensor.stride)
    assert sorted(range(tensor.dim()), key=found.stride) == order
    assert (found.stride(0) == 0) == (tensor.stride(0) == 0)


def test_a_model_that_computes_row_by_row_is_refused_with_what_differs(tmp_path: Path) -> None:
    message = (
        r"test_free_batch\.py\", line \d+, in forward[\s\S]*computes differently at another batch"
        r"[\s\S]*aten\.sin\.default at batch 2, aten\.select\.int at batch 4"
    )
    with pytest.raises(ConfigError, match=message):
        exported(RowByRow(), {}, tmp_path / "bundle")
