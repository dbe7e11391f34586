"""Check that every environment knob is read, typed and refused with its name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ditfastattn.core.env import DISABLE, DUMP, FUEL, VARIABLES, VERIFY, Knobs, read_knobs
from ditfastattn.core.errors import ConfigError


def test_defaults_when_nothing_is_set() -> None:
    assert read_knobs({}) == Knobs(dump="", disabled=(), fuel=-1, verify=True)


def test_empty_values_are_defaults() -> None:
    assert read_knobs(dict.fromkeys(VARIABLES, " ")) == Knobs()


def test_every_knob_is_read(tmp_path: Path) -> None:
    environ = {
        DUMP: str(tmp_path / "graphs"),
        DISABLE: "reuse-outputs, hoist-batch-slices,reuse-outputs",
        FUEL: "12",
        VERIFY: "0",
        "PATH": "not ours",
    }
    assert read_knobs(environ) == Knobs(
        dump=str(tmp_path / "graphs"),
        disabled=("reuse-outputs", "hoist-batch-slices"),
        fuel=12,
        verify=False,
    )


def test_reading_makes_no_folder(tmp_path: Path) -> None:
    read_knobs({DUMP: str(tmp_path / "graphs")})
    assert list(tmp_path.iterdir()) == []


def test_the_process_environment_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    assert read_knobs() == Knobs()
    monkeypatch.setenv(FUEL, "3")
    assert read_knobs() == Knobs(fuel=3)


@pytest.mark.parametrize(("value", "fuel"), [("-1", -1), ("0", 0), (" 7 ", 7)])
def test_fuel_values(value: str, fuel: int) -> None:
    assert read_knobs({FUEL: value}).fuel == fuel


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        (FUEL, "-2", "0 or more"),
        (FUEL, "1.5", "0 or more"),
        (FUEL, "1_000", "0 or more"),
        (FUEL, "many", "0 or more"),
        (FUEL, "9" * 5000, "0 or more"),
        (VERIFY, "2", "0 or 1"),
        (VERIFY, "true", "0 or 1"),
        (DISABLE, "a,,b", "single commas"),
        (DISABLE, "a,", "single commas"),
        (DISABLE, ",", "single commas"),
    ],
)
def test_a_bad_value_is_refused_by_name(variable: str, value: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_knobs({variable: value})
    message = str(caught.value)
    assert message.startswith(f"{variable}: ")
    assert f"got:      {value!r}" in message
    assert expected in message


def test_a_dump_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "graphs"
    file.write_text("")
    with pytest.raises(ConfigError, match=f"{DUMP}: not a folder"):
        read_knobs({DUMP: str(file)})


def test_a_misspelt_variable_is_refused() -> None:
    with pytest.raises(ConfigError, match="DITFASTATTN_DISABEL: unknown") as caught:
        read_knobs({"DITFASTATTN_DISABEL": "reuse-outputs"})
    assert DISABLE in str(caught.value)


def test_knobs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Knobs().fuel = 1  # type: ignore[misc]  # the assignment under test
