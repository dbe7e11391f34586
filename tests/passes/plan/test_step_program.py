"""Unrolling keeps exactly the caches that later steps read."""

from __future__ import annotations

import dataclasses

import pytest

from ditfastattn import CfgLayout, Strategy, VerifyError
from ditfastattn.passes.analysis.site import CacheDtype
from ditfastattn.passes.graph.slots import (
    Slot,
    factor_slots,
    output_slot,
    parse_slot,
    read_slots,
    residual_slot,
)
from ditfastattn.passes.plan.slot_schedule import Lives
from ditfastattn.passes.plan.step_program import StepProgram, _check_caches, unroll
from ditfastattn.passes.rewrites.pipeline import rewrite
from tests.helpers import TINY_MODELS, capture_sites, mixed_strategies

F, W, S, C = Strategy.FULL, Strategy.WINDOW, Strategy.SHARE_STEP, Strategy.SHARE_CFG
E, Q = Strategy.EXTRAPOLATE, Strategy.EXTRAPOLATE_QUADRATIC


def program(column: list[Strategy]) -> StepProgram:
    """Unroll a plan whose first site follows ``column``; the others are full."""
    tiny = TINY_MODELS["dit"]()
    captured, sites = capture_sites(tiny)
    rows = [(strategy, F, F) for strategy in column]
    return unroll(rows, captured, sites)


def lives_of(result: StepProgram) -> dict[Slot, Lives]:
    return {each.slot: each.lives for each in result.slots.slots}


def test_caches_live_from_their_writer_to_their_last_reader() -> None:
    result = program([F, W, S, S, C, F])
    site = "transformer_blocks.0.attn1"
    output, residual = output_slot(site, 0), residual_slot(site)
    assert lives_of(result) == {output: ((1, 3),), residual: ((0, 1),)}
    first_site = [result.variants[variant][0] for variant in result.schedule]
    assert [action.writes_output for action in first_site] == [False, True] + [False] * 4
    assert [action.writes_residual for action in first_site] == [True] + [False] * 5
    live = [result.slots.live_after(step) for step in range(6)]
    assert live == [{residual}, {output}, {output}, set(), set(), set()]


def test_a_residual_is_computed_only_where_the_next_window_reads_it() -> None:
    result = program([F, F, W, C, W, F])
    (residual,) = result.slots.slots
    assert residual.lives == ((1, 4),)  # step 0's would be overwritten unread; step 3 is not full


def test_a_line_keeps_the_last_two_outputs_while_it_reads_them() -> None:
    result = program([F, F, C, E, S, E, F, F])
    output, previous = (output_slot("transformer_blocks.0.attn1", 0, age) for age in range(2))
    assert lives_of(result) == {output: ((1, 2), (2, 5)), previous: ((2, 5),)}
    moves = [result.slots.moves_at(step) for step in (1, 2, 3)]
    assert moves == [(), ((previous, output),), ()]
    (factor,) = factor_slots("transformer_blocks.0.attn1", 1)
    factors = [result.slots.factors[step].get(factor) for step in range(8)]
    assert factors == [None, None, None, 1.0, None, 3.0, None, None]
    assert result.schedule[3] == result.schedule[5]  # the distance is an input, no constant
    assert result.slots.peak_bytes == 2 * 4 * 16 * 16 * 4


def test_a_parabola_keeps_the_last_three_outputs_while_it_reads_them() -> None:
    result = program([F, F, S, C, E, F, Q, S, Q, F, F])
    name = "transformer_blocks.0.attn1"
    output, previous, earlier = (output_slot(name, 0, age) for age in range(3))
    assert lives_of(result) == {
        output: ((1, 3), (3, 5), (5, 8)),
        previous: ((3, 5), (5, 8)),
        earlier: ((5, 8),),
    }
    moves = [dict(result.slots.moves_at(step)) for step in range(11)]
    assert moves[3] == {previous: output}
    assert moves[5] == {previous: output, earlier: previous}
    assert not any(moves[:3] + moves[4:5] + moves[6:])
    numbers = [tuple(result.slots.factors[step].values()) for step in range(11)]
    assert numbers[4] == (0.5,)
    # At steps 1, 3 and 5, evenly apart: last + d (last - previous) + c (previous - earlier).
    assert numbers[6] == pytest.approx((0.875, -0.375))
    assert numbers[8] == pytest.approx((1.5 * 4.5 / 2, -1.5 * 2.5 / 2))
    assert result.schedule[6] == result.schedule[8]  # the numbers are inputs, no constants
    assert result.slots.peak_bytes == 3 * 4 * 16 * 16 * 4


@pytest.mark.parametrize("column", [[F, E], [F, F, Q], [F, F, E, Q]])
def test_a_curve_without_enough_outputs_is_our_bug(column: list[Strategy]) -> None:
    site = "transformer_blocks.0.attn1"
    message = f"step {len(column) - 1} reads {site}/factor.0, which no step has written"
    with pytest.raises(VerifyError, match=message):
        program([*column, F, F])


def test_equal_steps_share_a_variant() -> None:
    result = program([F, S, S, S, S, F])
    assert result.schedule[1:5] == (1, 1, 1, 1)
    assert len(result.variants) == 3  # the first full step writes what the last need not


def test_merged_variants_store_what_any_of_their_steps_must() -> None:
    tiny = TINY_MODELS["dit"]()
    captured, sites = capture_sites(tiny)
    column = [F, S, F, W, F, F]
    rows = [(strategy, F, F) for strategy in column]
    merged = unroll(rows, captured, sites, merge_variants=True)
    assert len(unroll(rows, captured, sites).variants) == 5
    assert len(merged.variants) == 3  # full, shared, window
    (full,) = {merged.variants[merged.schedule[step]][0] for step in (0, 2, 4, 5)}
    assert full.writes_output
    assert full.writes_residual
    site = sites[0].name  # no step reads the other writes
    assert lives_of(merged) == {output_slot(site, 0): ((0, 1),), residual_slot(site): ((2, 3),)}


def test_peak_bytes_count_what_a_step_makes_beside_what_it_reads() -> None:
    result = program([F, W, S, S, C, F])
    output = 4 * 16 * 16 * 4  # [B, N, C] fp32
    residual = 4 * 2 * 16 * 8 * 4  # [B, H, N, D] fp32
    assert sorted(slot.bytes for slot in result.slots.slots) == sorted((output, residual))
    assert result.slots.bytes_written == (residual, output, 0, 0, 0, 0)
    assert result.slots.peak_bytes == residual + output  # step 1 reads the one, makes the other
    assert program([F, W, W, S, W, S]).slots.peak_bytes == output + residual


def test_a_dense_plan_keeps_nothing() -> None:
    result = program([F] * 6)
    assert result.slots.slots == ()
    assert result.slots.peak_bytes == 0
    assert len(result.variants) == 1


def test_a_read_without_a_writer_is_our_bug() -> None:
    good = program([F, S, F, F, F, F])
    slots = dataclasses.replace(good.slots, slots=())
    with pytest.raises(VerifyError, match=r"step 1 reads .*attn1/output.0, which no step has writ"):
        _check_caches(dataclasses.replace(good, slots=slots))


def test_every_slot_of_a_mixed_plan_is_written_before_it_is_read() -> None:
    tiny = TINY_MODELS["sd3"]()
    captured, sites = capture_sites(tiny)
    result = unroll(mixed_strategies(sites), captured, sites)
    assert all(written < read for slot in result.slots.slots for written, read in slot.lives)


@pytest.mark.parametrize("name", ["invariant", "x/hoisted", "residual", "a/output.0@1"])
def test_a_site_may_have_the_name_of_a_slot(name: str) -> None:
    captured, (site, *_) = capture_sites(TINY_MODELS["dit"]())
    named = dataclasses.replace(site, name=name, cache_dtype=CacheDtype.FLOAT16)
    rows = [[F], [F], [E], [S]]
    result = unroll(rows, captured, [named])
    reads = [
        read_slots(rewrite(captured, result.sites, row, CfgLayout.NONE).graph)
        for row in result.variants
    ]
    slots = {slot for each in reads for slot in each}
    assert {slot.site for slot in slots} == {name}
    assert {each.dtype for each in result.slots.slots} == {"float16"}
    assert [parse_slot(str(slot)) for slot in slots] == list(slots)
