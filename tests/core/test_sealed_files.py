"""What only we read again tells of any bit that was changed since it was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.strict_json import read_sealed, write_sealed
from ditfastattn.core.tensor_files import read_tensors, write_tensors

DATA = {"drift": 0.125, "psnr": float("inf"), "strategies": [["full", "window"]], "name": "\u00e9"}
TENSORS = {
    "half": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "none": torch.empty(0),
    "whole": torch.tensor(3),
}


def read_data(path: Path) -> Any:
    return read_sealed(path, "the data")


@pytest.mark.parametrize("kind", ["json", "tensors"])
def test_each_changed_bit_is_noticed(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "file"
    read: Callable[[Path], Any] = read_data if kind == "json" else read_tensors
    if kind == "json":
        write_sealed(path, DATA)
        assert read(path) == DATA
    else:
        write_tensors(path, TENSORS)
        assert {name: item.tolist() for name, item in read(path).items()} == {
            name: item.tolist() for name, item in TENSORS.items()
        }
    whole = path.read_bytes()
    every = 1 if request.config.getoption("all") else 7  # by default all bits of a byte in turn
    for place in range(0, 8 * len(whole), every):
        changed = bytearray(whole)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            found = read(path)
        except ConfigError:
            continue
        assert kind == "json"
        assert found == DATA  # a space, or a letter written otherwise
        assert json.loads(changed) == json.loads(whole)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        if kind == "json" and size == len(whole) - 1:
            continue  # the last line's end
        with pytest.raises(ConfigError):
            read(path)
