"""The pass runner honours its knobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditfastattn import CfgLayout, ConfigError, Strategy
from ditfastattn.passes.graph.slots import read_slots
from ditfastattn.passes.plan.actions import SiteAction
from ditfastattn.passes.rewrites.pipeline import PASS_NAMES, rewrite
from tests.helpers import TINY_MODELS, capture_sites

SHARED = (SiteAction(Strategy.SHARE_STEP),) * 3
LAYOUT = CfgLayout.COND_FIRST


def test_the_pipeline_reads_at_a_glance() -> None:
    assert PASS_NAMES == (
        "store-caches",
        "window-residual",
        "reuse-outputs",
        "share-guidance",
        "merge-heads",
        "narrow-caches",
        "hoist-invariants",
        "fold-timesteps",
        "hoist-batch-slices",
        "eliminate-dead-code",
    )


@pytest.mark.parametrize(("fuel", "rewritten"), [("0", 0), ("2", 2), ("9", 3)])
def test_fuel_stops_after_n_rewrites(
    fuel: str, rewritten: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DITFASTATTN_FUEL", fuel)
    captured, sites = capture_sites(TINY_MODELS["dit"]())
    assert len(read_slots(rewrite(captured, sites, SHARED, LAYOUT).graph)) == rewritten


def test_a_pass_can_be_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITFASTATTN_DISABLE", "reuse-outputs")
    captured, sites = capture_sites(TINY_MODELS["dit"]())
    assert read_slots(rewrite(captured, sites, SHARED, LAYOUT).graph) == ()


def test_an_unknown_pass_name_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITFASTATTN_DISABLE", "reuse-output")
    captured, sites = capture_sites(TINY_MODELS["dit"]())
    with pytest.raises(ConfigError, match=r"unknown pass[\s\S]*reuse-output[\s\S]*expected"):
        rewrite(captured, sites, SHARED, LAYOUT)


def test_graphs_are_dumped_around_each_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DITFASTATTN_DUMP", str(tmp_path))
    captured, sites = capture_sites(TINY_MODELS["dit"]())
    rewrite(captured, sites, SHARED, LAYOUT, label="variant-07")
    names = sorted(path.name for path in (tmp_path / "variant-07").iterdir())
    assert names[0] == "00-dense.txt"
    assert any(name.endswith("reuse-outputs.txt") for name in names)
    assert (
        "cache_transformer_blocks_0_attn1_output_0"
        in (tmp_path / "variant-07" / names[-1]).read_text()
    )
