"""The pass runner honours its knobs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import scaled_dot_product_attention

from ditfastattn import CfgLayout, ConfigError, Strategy, VerifyError
from ditfastattn.passes.analysis.site import CacheDtype
from ditfastattn.passes.analysis.sites import find_sites
from ditfastattn.passes.graph.slots import read_slots
from ditfastattn.passes.plan.actions import SiteAction
from ditfastattn.passes.plan.strategies import FITTED, every_strategy
from ditfastattn.passes.rewrites import pipeline
from ditfastattn.passes.rewrites.base import PassResult
from ditfastattn.passes.rewrites.eliminate_dead_code import EliminateDeadCode
from ditfastattn.passes.rewrites.pipeline import (
    PASS_NAMES,
    rewrite,
    switches,
    unroll_available,
    variant_passes,
)
from ditfastattn.passes.rewrites.reuse_outputs import ReuseOutputs
from tests.helpers import TINY_MODELS, capture_model, capture_sites

SHARED = (SiteAction(Strategy.SHARE_STEP),) * 3
LAYOUT = CfgLayout.COND_FIRST
F, W, S, C = Strategy.FULL, Strategy.WINDOW, Strategy.SHARE_STEP, Strategy.SHARE_CFG
B, E, Q = Strategy.WINDOW_SHARE_CFG, Strategy.EXTRAPOLATE, Strategy.EXTRAPOLATE_QUADRATIC
R = Strategy.SHARE_CFG_REFRESH


def test_the_pipeline_reads_at_a_glance() -> None:
    assert PASS_NAMES == (
        "store-caches",
        "window-residual",
        "reuse-outputs",
        "fit-outputs",
        "share-guidance",
        "merge-heads",
        "narrow-caches",
        "hoist-invariants",
        "hoist-batch-slices",
        "eliminate-dead-code",
    )


def test_a_pass_requires_earlier_passes_alone() -> None:
    passes = variant_passes((), (), LAYOUT)
    for place, step in enumerate(passes):
        assert set(step.requires) <= set(PASS_NAMES[:place])


@pytest.mark.parametrize(
    ("disabled", "off"),
    [
        ("", ()),
        (
            "store-caches",
            ("store-caches", "window-residual", "reuse-outputs", "fit-outputs", "narrow-caches"),
        ),
        ("share-guidance", ("share-guidance", "hoist-batch-slices")),
        ("merge-heads,window-residual", ("window-residual", "merge-heads")),
    ],
)
def test_what_reads_the_result_of_a_disabled_pass_is_off_too(
    disabled: str, off: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DITFASTATTN_DISABLE", disabled)
    assert tuple(switches().off) == off


def test_the_log_says_why_a_pass_is_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DITFASTATTN_DISABLE", "store-caches")
    captured, sites = capture_sites(TINY_MODELS["dit"]())
    with caplog.at_level(logging.INFO, logger="ditfastattn"):
        assert read_slots(rewrite(captured, sites, SHARED, LAYOUT).graph) == ()
    assert "store-caches: off: named in DITFASTATTN_DISABLE" in caplog.text
    assert "reuse-outputs: off: it requires store-caches, which is off" in caplog.text


@pytest.mark.parametrize(
    ("disabled", "two_calls", "left"),
    [
        ("window-residual", False, {W: F, B: C}),
        ("share-guidance", False, {C: F, R: F, B: W}),
        ("reuse-outputs", False, {S: F, E: F, Q: F}),
        ("reuse-outputs", True, {S: F, C: F, R: F, B: W, E: F, Q: F}),
        ("store-caches", False, {W: F, S: F, B: C, E: F, Q: F} | dict.fromkeys(FITTED, F)),
        (
            "store-caches",
            True,
            {W: F, S: F, C: F, R: F, B: F, E: F, Q: F} | dict.fromkeys(FITTED, F),
        ),
        ("fit-outputs", False, dict.fromkeys(FITTED, F)),
        ("share-guidance,window-residual", False, {W: F, C: F, R: F, B: F}),
        ("merge-heads,narrow-caches,hoist-invariants", True, {}),
    ],
)
def test_a_plan_is_reduced_to_what_the_passes_left_carry_out(
    disabled: str,
    two_calls: bool,
    left: dict[Strategy, Strategy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DITFASTATTN_DISABLE", disabled)
    every = every_strategy()
    (row,) = switches().plan([every], two_calls)
    assert dict(zip(every, row, strict=True)) == {s: left.get(s, s) for s in every}


def test_a_program_keeps_no_cache_that_a_disabled_pass_would_read_or_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captured, sites = capture_sites(TINY_MODELS["dit"]())
    rows = [(F, F, F), (F, W, C), (S, E, B)]
    assert unroll_available(rows, captured, sites).slots.slots
    for name in ("store-caches", "window-residual,reuse-outputs"):
        monkeypatch.setenv("DITFASTATTN_DISABLE", name)
        program = unroll_available(rows, captured, sites)
        assert program.slots.slots == ()
        assert program.slots.peak_bytes == 0
    monkeypatch.setenv("DITFASTATTN_DISABLE", "narrow-caches")
    half = [site.with_caches_in(CacheDtype.FLOAT16) for site in sites]
    slots = unroll_available(rows, captured, half).slots.slots
    assert {slot.dtype for slot in slots} == {"float32"}


@dataclass(frozen=True)
class Lying:
    """Report otherwise than it does."""

    reported: int
    declined: tuple[str, ...] = ()
    name: str = "lying"
    requires: tuple[str, ...] = ()

    def run(self, module: GraphModule) -> PassResult:
        if not self.reported:
            EliminateDeadCode().run(module)
        return PassResult(self.reported, self.declined)


@pytest.mark.parametrize(
    ("reported", "message"),
    [
        (0, r"after reuse-outputs, lying: no change reported, but the graph changed"),
        (2, r"after reuse-outputs, lying: 2 changes reported, but nothing changed"),
    ],
)
def test_a_false_report_is_an_error(
    reported: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured, sites = capture_sites(TINY_MODELS["dit"]())
    shared = ReuseOutputs(tuple((site, Strategy.SHARE_STEP) for site in sites))
    passes = shared, Lying(reported)
    monkeypatch.setattr(pipeline, "variant_passes", lambda *_: passes)
    with pytest.raises(VerifyError, match=message):
        rewrite(captured, sites, SHARED, LAYOUT)
    monkeypatch.setenv("DITFASTATTN_VERIFY", "0")
    rewrite(captured, sites, SHARED, LAYOUT)


def test_declined_sites_are_logged_where_nothing_changed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Mixing(torch.nn.Module):
        def forward(self, hidden_states: Tensor, scale: Tensor) -> Tensor:
            query = hidden_states.cumsum(0)
            attended = scaled_dot_product_attention(query, query, query)
            return hidden_states + attended.cumsum(0) * scale

    call = {"hidden_states": torch.randn(2, 1, 16, 8), "scale": torch.randn(2, 1, 1, 1)}
    captured = capture_model(Mixing(), call)
    (site,) = find_sites(captured).sites
    with caplog.at_level(logging.DEBUG, logger="ditfastattn"):
        rewrite(captured, (site,), (SiteAction(Strategy.SHARE_CFG),), LAYOUT)
    assert "variant: hoist-batch-slices: 0 rewritten, 1 declined" in caplog.text
    assert "hoist-batch-slices: declined: cumsum_1: no rule moves half of the batch" in caplog.text


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
