"""JSON is read strictly: whatever two readers could understand differently is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.records import Record
from ditfastattn.core.strict_json import parse_json, read_json


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ('{"a": 1, "a": 2}', "'a' occurs 2 times"),
        ('{"b": [{"a\\n": 1, "a\\n": 2}]}', "occurs 2 times"),
        ("[NaN]", "NaN is not JSON"),
        ("[-Infinity]", "-Infinity is not JSON"),
        ("[1e999]", "too large for a number"),
        ("[" + "9" * 5000 + "]", "not JSON"),
        ("[" * 65 + "]" * 65, "nested more than 64 deep"),
        ("[" * 100_000 + "]" * 100_000, "nested more than 64 deep"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested more than 64 deep"),
        (r'["\ud800"]', "surrogates not allowed"),
        (r'{"\udfff": 1}', "surrogates not allowed"),
        ("\ufeff{}", "not JSON"),
    ],
)
def test_json_of_two_meanings_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"it.json: the plan (.|\n)*{said}"):
        parse_json(text, "it.json", "the plan")


@pytest.mark.parametrize("text", ["null", r'["\ud83d\ude00", 1e300, -0.0]', "[" * 64 + "]" * 64])
def test_json_is_read(text: str) -> None:
    parse_json(text, "it.json", "the plan")


def test_only_a_file_of_bounded_size_is_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for content, said in ((b"[1, 2]", "too large"), (b"\xff", "not text in UTF-8")):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=said):
            read_json(path, "the plan", most_bytes=3)
    path.unlink()
    with pytest.raises(ConfigError, match="cannot read the plan"):
        read_json(path, "the plan")
    os.mkfifo(path)  # to open one waits for a writer
    with pytest.raises(ConfigError, match="expected: a regular file"):
        read_json(path, "the plan")


def test_no_record_holds_nan() -> None:
    class Measured(Record, frozen=True):
        worst: float

    assert Measured.from_json({"worst": "Infinity"}, "it", "").worst == float("inf")
    with pytest.raises(ConfigError, match=r"it: worst: (.|\n)*NaN is not a number"):
        Measured.from_json({"worst": "NaN"}, "it", "")
