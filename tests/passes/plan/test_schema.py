"""Plans round-trip and refuse what cannot be right."""

from __future__ import annotations

import json
import os
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ditfastattn import ConfigError, Plan

FULL, SHARE = "full", "share-step"


def plan_data(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = {
        "schema_version": 3,
        "model": {"structure": "a", "weights": "b", "dtype": "float32"},
        "inputs": {"hidden_states": [4, 8, 8], "timestep": []},
        "sampler": {
            "scheduler": "DDIMScheduler",
            "config": {"beta_start": 0.0001},
            "steps": 3,
            "timesteps": [900.0, 600.0, 300.0],
            "guidance_scale": 2.0,
            "cfg_layout": "cond-first",
        },
        "sites": [
            {
                "name": "blocks.0.attn",
                "kind": "self",
                "tokens": 16,
                "heads": 2,
                "head_dim": 8,
                "window": 2,
            }
        ],
        "strategies": [[FULL], ["window"], [SHARE]],
        "calibration": {"method": "greedy", "strength": 0.1, "seed": 0},
    }
    return data | changes


def parse(data: Any) -> Plan:
    return Plan.parse(json.dumps(data), "plan.json")


def test_a_plan_round_trips_through_its_file(tmp_path: Path) -> None:
    plan = parse(plan_data())
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.changed == 2
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]  # no temporary file is left


def test_a_failed_save_leaves_the_old_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    parse(plan_data()).save(path)
    before = path.read_text()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("ditfastattn.passes.plan.schema.os.replace", fail)
    with pytest.raises(ConfigError, match=r"plan\.json: cannot write the file(.|\n)*disk full"):
        parse(plan_data(inputs={})).save(path)
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 1}, r"schema_version.*another schema version[\s\S]*got: +1"),
        ({"schema_version": None}, "another schema version"),
        ({"surprise": 1}, r"plan.json: surprise: Extra inputs are not permitted"),
        ({"strategies": [[FULL]]}, "1 rows for 3 steps"),
        ({"strategies": [[FULL], [FULL, FULL], [FULL]]}, r"strategies\[1\]: 2 entries for 1 sites"),
        ({"strategies": [[FULL], ["skip"], [FULL]]}, "strategies.1.0"),
        ({"strategies": [[SHARE], [FULL], [FULL]]}, "no earlier step computes an output"),
        ({"strategies": [["window"], [FULL], [FULL]]}, "no earlier step computes the residual"),
        (
            {"strategies": [[FULL], ["extrapolate"], [FULL]]},
            "it reads the outputs of 2 earlier steps, and only 1 of them compute one",
        ),
        (
            {"strategies": [[FULL], [FULL], ["extrapolate-quadratic"]]},
            "it reads the outputs of 3 earlier steps, and only 2 of them compute one",
        ),
        (
            {"strategies": [["share-cfg"], ["window"], [FULL]]},
            "no earlier step computes the residual",
        ),
        ({"sites": []}, "1 entries for 0 sites"),
        (
            {"sites": plan_data()["sites"] * 2, "strategies": [[FULL, FULL]] * 3},
            r"sites: 'blocks.0.attn' occurs 2 times",
        ),
        ({"sampler": plan_data()["sampler"] | {"timesteps": [3.0, nan, 1.0]}}, "NaN is not JSON"),
        ({"sampler": plan_data()["sampler"] | {"guidance_scale": inf}}, "Infinity is not JSON"),
        ({"sampler": plan_data()["sampler"] | {"guidance_scale": "inf"}}, "finite number"),
    ],
)
def test_an_impossible_plan_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(plan_data(**changes))


def test_window_and_guidance_must_be_legal() -> None:
    site = plan_data()["sites"][0] | {"window": 0}
    with pytest.raises(ConfigError, match="a window is not legal at this site"):
        parse(plan_data(sites=[site]))
    sampler = plan_data()["sampler"] | {"cfg_layout": "none"}
    with pytest.raises(ConfigError, match="guidance is not batched"):
        parse(plan_data(sampler=sampler, strategies=[[FULL], ["share-cfg"], [FULL]]))


def test_an_absent_or_broken_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the plan"):
        Plan.load(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text(json.dumps(plan_data())[:-9])
    with pytest.raises(ConfigError, match="not JSON"):
        Plan.load(tmp_path / "broken.json")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"merge_variants"', '"schema_version": 3, "merge_variants"', "occurs 2 times"),
        ('"steps": 3', '"steps": NaN', "NaN is not JSON"),
        ('"strength": 0.1', '"strength": "NaN"', "NaN is not a number"),
        ('"device": ""', r'"device": "\ud800"', "surrogates not allowed"),
        ('"beta_start": 0.0001', f'"a": {"[" * 99}{"]" * 99}', "nested more than 64 deep"),
        ('"beta_start": 0.0001', f'"a": {"[" * 10**5}{"]" * 10**5}', "nested more than 64 deep"),
    ],
)
def test_json_that_two_readers_read_differently_is_refused(
    old: str, new: str, said: str, tmp_path: Path
) -> None:
    text = parse(plan_data()).model_dump_json().replace(":", ": ").replace(": :", ":")
    assert old in text
    (tmp_path / "plan.json").write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=said):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "", "loop", "pipe"])
def test_what_is_not_a_file_is_not_a_plan(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")  # to open one waits for a writer
    with pytest.raises(ConfigError, match="cannot read the plan"):
        Plan.load(tmp_path / name)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(key=st.sampled_from(sorted(plan_data())), junk=json_values)
def test_junk_in_any_field_is_a_config_error_or_a_plan(key: str, junk: Any) -> None:
    try:
        plan = parse(plan_data(**{key: junk}))
    except ConfigError:
        return
    assert Plan.parse(plan.model_dump_json()) == plan


def whole_output(**changes: Any) -> dict[str, Any]:
    """Return a plan of an attention and the whole output, which is fitted at the last step."""
    data = plan_data()
    data["sites"].append(
        {
            "name": "output",
            "kind": "output",
            "tokens": 64,
            "heads": 1,
            "head_dim": 4,
            "window": 0,
            "latent": "hidden_states",
            "coefficients": [[], [], [[0.1, 1.0, 0.5], [0.1, 1.0, 0.5]]],
        }
        | changes
    )
    data["strategies"] = [[FULL, FULL], ["window", FULL], [SHARE, "fitted-1"]]
    return data


def test_a_fitted_output_round_trips() -> None:
    plan = parse(whole_output())
    assert Plan.parse(plan.model_dump_json()) == plan
    assert "coefficients" not in json.loads(plan.model_dump_json())["sites"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"coefficients": []},
            r"sites \(output\): coefficients\[2\]: \[\] numbers, expected \[3, 3\] for fitted-1",
        ),
        ({"coefficients": [[], [], [[0.1, 1.0, 0.5]]]}, r"\[3\] numbers, expected \[3, 3\]"),
        ({"coefficients": [[], [[0.1, 1.0, 0.5]] * 2]}, "coefficients: 2 steps"),
        ({"coefficients": [[], [[0.1]], [[0.1, 1.0, 0.5]] * 2]}, r"coefficients\[1\]: \[1\] num"),
    ],
)
def test_coefficients_must_suit_the_strategies(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(whole_output(**change))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [[FULL, FULL], ["window", FULL], [FULL, "fitted-1"]],
            "nothing within runs: expected share-step at every site there",
        ),
        ([[FULL, SHARE], ["window", FULL], [SHARE, "fitted-1"]], "no earlier step computes an"),
        ([[SHARE, "fitted-1"], [FULL, FULL], [FULL, FULL]], "no earlier step computes an output"),
        (
            [[FULL, FULL], [SHARE, FULL], [SHARE, "fitted-2"]],
            r"coefficients\[2\]: \[3, 3\] numbers, expected \[5, 5\] for fitted-2",
        ),
        ([["fitted-1", FULL], [FULL, FULL], [FULL, FULL]], r"expected \[3, 3\] for fitted-1"),
    ],
)
def test_an_impossible_whole_step_is_refused(rows: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(whole_output() | {"strategies": rows})


def blocks(**changes: Any) -> dict[str, Any]:
    """Return a plan of three attentions, and a range of the last two, which is shared once."""
    data = plan_data()
    site = data["sites"][0]
    sites = [{**site, "name": f"blocks.{index}.attn"} for index in range(3)]
    name = "blocks.1.attn..blocks.2.attn"
    ends = ["blocks.1.attn", "blocks.2.attn"]
    span = {**site, "name": name, "kind": "blocks", "ends": ends, "window": 0} | changes
    rows = [[FULL] * 4, [FULL, SHARE, SHARE, SHARE], [SHARE, FULL, FULL, FULL]]
    return data | {"sites": [*sites, span], "strategies": rows}


def test_a_range_of_blocks_round_trips() -> None:
    plan = parse(blocks())
    assert Plan.parse(plan.model_dump_json()) == plan
    assert "ends" not in json.loads(plan.model_dump_json())["sites"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ends": []}, "expected the first and the last site, and their name"),
        ({"name": "blocks 1 and 2"}, "expected the first and the last site, and their name"),
        ({"kind": "self"}, "only a range of blocks has them"),
        (
            {"ends": ["a", "b"], "name": "a..b"},
            "a is not an attention or feed-forward listed",
        ),
        (
            {"ends": ["blocks.2.attn", "blocks.1.attn"], "name": "blocks.2.attn..blocks.1.attn"},
            "blocks.2.attn comes after blocks.1.attn",
        ),
        (
            {"coefficients": [[], [[0.1, 1.0, 0.5]] * 2]},
            r"coefficients: 2 steps",
        ),
    ],
)
def test_an_impossible_range_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(blocks(**change))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[FULL] * 4, [FULL, FULL, SHARE, SHARE], [FULL] * 4], "expected share-step at every site"),
        ([[FULL, SHARE, SHARE, SHARE], [FULL] * 4, [FULL] * 4], "no earlier step computes an"),
        ([[FULL] * 4, [FULL, SHARE, SHARE, "extrapolate"], [FULL] * 4], "outputs of 2 earlier"),
        ([[FULL] * 4, [FULL] * 3 + ["share-cfg"], [FULL] * 4], "streams of their own"),
        ([[FULL] * 4, [FULL, SHARE, SHARE, "fitted-1"], [FULL] * 4], "expected|whole output alone"),
        ([[FULL] * 4, [FULL] * 3 + ["window"], [FULL] * 4], "a window is not legal"),
    ],
)
def test_what_a_range_cannot_do_is_refused(rows: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(blocks() | {"strategies": rows})


def test_ranges_that_overlap_are_refused_and_nested_ones_not() -> None:
    data = blocks()
    first = {**data["sites"][3], "ends": ["blocks.0.attn", "blocks.1.attn"]}
    first["name"] = "blocks.0.attn..blocks.1.attn"
    rows = [[*row, FULL] for row in [[FULL] * 4] * 3]
    with pytest.raises(ConfigError, match="overlap, and neither holds the other"):
        parse(data | {"sites": [*data["sites"], first], "strategies": rows})
    whole = {**first, "ends": ["blocks.0.attn", "blocks.2.attn"]}
    whole["name"] = "blocks.0.attn..blocks.2.attn"
    nested = data | {"sites": [*data["sites"], whole]}
    parse(nested | {"strategies": [[FULL] * 5, [SHARE] * 5, [SHARE, FULL, FULL, FULL, FULL]]})
    rows = [[FULL] * 5, [SHARE, SHARE, SHARE, FULL, SHARE], [FULL] * 5]
    with pytest.raises(ConfigError, match="expected share-step at every site there"):
        parse(nested | {"strategies": rows})
    sites = [data["sites"][3], *data["sites"][:3]]
    with pytest.raises(ConfigError, match="after the sites they hold"):
        parse(data | {"sites": sites, "strategies": [[FULL] * 4] * 3})
