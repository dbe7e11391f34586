"""Each record of the table is consistent with itself."""

from __future__ import annotations

import pytest
import torch

from ditfastattn.passes.plan.strategies import Strategy, strategies, strategy_named

REUSING = tuple(strategy for strategy in strategies() if not strategy.computes)


@pytest.mark.parametrize("strategy", REUSING, ids=str)
@pytest.mark.parametrize(("elapsed", "gaps"), [(1, (1, 1)), (3, (2, 2)), (2, (1, 4))])
def test_three_formulas_of_a_reused_output_agree(
    strategy: Strategy, elapsed: int, gaps: tuple[int, ...]
) -> None:
    used = gaps[: strategy.outputs_read - 1]
    steps = [0]
    for gap in used:
        steps.append(steps[-1] - gap)
    outputs = torch.randn(strategy.outputs_read, 5, dtype=torch.float64)
    history = list(zip(reversed(steps), outputs.flip(0), strict=True))
    weights = strategy.weights(elapsed, used)
    assert sum(weights) == pytest.approx(1.0)
    weighted = sum(w * o for w, o in zip(weights, outputs, strict=True))
    assert strategy.combine is not None
    assert strategy.reference is not None
    factors = strategy.factors(elapsed, used)
    assert len(factors) == strategy.factor_count
    torch.testing.assert_close(strategy.combine(list(outputs), factors), weighted)
    torch.testing.assert_close(strategy.reference(history, elapsed), weighted)


def test_labels_symbols_and_colours_distinguish_strategies() -> None:
    for shown in ("name", "label", "symbol", "colour"):
        assert len({getattr(strategy, shown) for strategy in strategies()}) == len(strategies())


def test_a_name_gives_its_strategy_and_an_unknown_one_the_names() -> None:
    assert all(strategy_named(str(strategy)) is strategy for strategy in strategies())
    with pytest.raises(ValueError, match="unknown strategy 'skip', expected one of: full, window"):
        strategy_named("skip")


@pytest.mark.parametrize("strategy", [Strategy.SHARE_CFG, Strategy.WINDOW_SHARE_CFG], ids=str)
def test_the_twin_for_both_branches_computes_the_same(strategy: Strategy) -> None:
    twin = strategy.for_both_branches
    assert not twin.shares_guidance
    assert twin.windowed == strategy.windowed
