"""The table of strategies: everything that is particular to one is stated in its record.

A strategy says what a site does at one step. It either *computes* an output, within a window or
for one guidance branch only if it says so, or it *reuses* the outputs of earlier steps. Plans,
legality, unrolling, rewriting, the plan interpreter, the searches and the figures read these
records. They name only the two primitives, ``FULL`` (compute everything) and ``SHARE_STEP`` (repeat
the last output). To add a strategy, add its record to ``STRATEGIES``.

``FITTED`` are strategies of the model's whole output alone: its weights are neither rules nor sum
to 1, they are fitted on calibration trajectories, and stand in the plan.

What a strategy costs is not stated: operations are counted in the rewritten graph, seconds are
measured, and the bytes of its caches follow from ``outputs_read`` and ``windowed``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any, ClassVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from ditfastattn.passes.plan.curves import change_factors, curve, output_weights

Gaps = Sequence[int]
Numbers = tuple[float, ...]
# ``combine`` and ``reference`` work on anything that has +, - and *: tensors, and values of graphs.
Combine = Callable[[Sequence[Any], Sequence[Any]], Any]
Reference = Callable[[Sequence[tuple[int, Any]], int], Any]


def _no_factors(_elapsed: int, _gaps: Gaps) -> Numbers:
    return ()


@dataclass(frozen=True)
class Strategy:
    """Describe one strategy (DiTFastAttn, section 3; extrapolation is TaylorSeer's, equation 3).

    Attributes:
        name: in plans; two records of one name are the same strategy.
        label: in figures.
        symbol: one character, in terminals.
        colour: in figures, ``#rrggbb``.
        terminal_colour: of the symbol, as rich names it.
        effort: the rough share of a full site's work; greedy search tries the least first.
        windowed: attends within the site's window and adds the cached residual.
        shares_guidance: computes the conditional branch alone, which serves both.
        refreshes_residual: may store the residual that later windows read: of both guidance
            branches, or where it shares guidance of the conditional one, which serves both.
        outputs_read: how many of the outputs computed last it is made of; 0 where it computes.
        fitted: the plan holds its weights, ``combine`` takes terms in place of outputs (see
            ``fitted_terms``).
        weights: from the steps since the last output and the gaps between outputs (the latest
            first) to the weight of each output, the last one first. They sum to 1, so that it is
            the same to combine outputs before or after an affine output projection.
        factors: from the same to the fp32 numbers that ``combine`` takes; they are inputs of the
            graph, so that steps which differ in them alone are one variant.
        combine: from the outputs, the last one first, and the factors to what the site returns.
        reference: the same from pairs of step and output, the last one last, and the step: what
            the plan interpreter computes, by another formula where there is one.

    """

    name: str
    label: str = field(compare=False)
    symbol: str = field(compare=False)
    colour: str = field(compare=False)
    terminal_colour: str = field(compare=False)
    effort: float = field(compare=False)
    windowed: bool = field(default=False, compare=False)
    shares_guidance: bool = field(default=False, compare=False)
    refreshes_residual: bool = field(default=False, compare=False)
    outputs_read: int = field(default=0, compare=False)
    fitted: bool = field(default=False, compare=False)
    weights: Callable[[int, Gaps], Numbers] = field(default=_no_factors, compare=False, repr=False)
    factors: Callable[[int, Gaps], Numbers] = field(default=_no_factors, compare=False, repr=False)
    combine: Combine | None = field(default=None, compare=False, repr=False)
    reference: Reference | None = field(default=None, compare=False, repr=False)

    FULL: ClassVar[Strategy]
    WINDOW: ClassVar[Strategy]
    SHARE_STEP: ClassVar[Strategy]
    SHARE_CFG: ClassVar[Strategy]
    WINDOW_SHARE_CFG: ClassVar[Strategy]
    SHARE_CFG_REFRESH: ClassVar[Strategy]
    EXTRAPOLATE: ClassVar[Strategy]
    EXTRAPOLATE_QUADRATIC: ClassVar[Strategy]

    def __str__(self) -> str:
        """Return the name."""
        return self.name

    @property
    def computes(self) -> bool:
        """Return whether the site computes an output, rather than reuse earlier ones."""
        return self.outputs_read == 0

    @property
    def needs_window(self) -> bool:
        """Return whether it means nothing at a site without a window."""
        return self.windowed or (self.refreshes_residual and self.shares_guidance)

    @property
    def extrapolates(self) -> bool:
        """Return whether the output is made of several earlier ones."""
        return self.outputs_read > 1

    @property
    def factor_count(self) -> int:
        """Return how many factors ``combine`` takes, where they follow from the steps."""
        return len(self.factors(1, (1,) * (self.outputs_read - 1))) if self.outputs_read else 0

    @property
    def repeats(self) -> bool:
        """Return whether the output is the last one as it is."""
        return self.outputs_read == 1 and self.weights(1, ()) == (1.0,)

    @property
    def for_both_branches(self) -> Strategy:
        """Return the strategy that computes the same for both guidance branches."""
        return computing(self.windowed, False) if self.shares_guidance else self

    @classmethod
    def __get_pydantic_core_schema__(
        cls, _source: Any, _handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Write a strategy as its name, and read it back."""
        return core_schema.no_info_plain_validator_function(
            _read, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )


def _read(item: Any) -> Strategy:
    if isinstance(item, Strategy):
        return item
    return strategy_named(item)


Strategy.FULL = Strategy(
    name="full",
    label="full",
    symbol="F",
    colour="#26323f",
    terminal_colour="white",
    effort=1.0,
    refreshes_residual=True,
)
Strategy.WINDOW = Strategy(  # WA-RS
    name="window",
    label="window + residual",
    symbol="w",
    colour="#0072b2",
    terminal_colour="cyan",
    effort=0.4,
    windowed=True,
)
Strategy.SHARE_STEP = Strategy(  # AST
    name="share-step",
    label="step shared",
    symbol=".",
    colour="#f7efc4",
    terminal_colour="green",
    effort=0.0,
    outputs_read=1,
    weights=lambda elapsed, gaps: (1.0,),
    combine=lambda outputs, factors: outputs[0],
    reference=lambda history, step: history[-1][1],
)
Strategy.SHARE_CFG = Strategy(  # ASC
    name="share-cfg",
    label="guidance shared",
    symbol="c",
    colour="#e69f00",
    terminal_colour="yellow",
    effort=0.5,
    shares_guidance=True,
)
Strategy.WINDOW_SHARE_CFG = Strategy(  # both; the residual is the conditional branch's
    name="window+share-cfg",
    label="window + residual, guidance shared",
    symbol="x",
    colour="#56b4e9",
    terminal_colour="magenta",
    effort=0.2,
    windowed=True,
    shares_guidance=True,
)
Strategy.SHARE_CFG_REFRESH = Strategy(  # ASC as in the authors' code, which refreshes here too
    name="share-cfg+refresh",
    label="guidance shared, residual refreshed",
    symbol="r",
    colour="#8c510a",
    terminal_colour="yellow",
    effort=0.6,
    shares_guidance=True,
    refreshes_residual=True,
)
Strategy.EXTRAPOLATE = Strategy(
    name="extrapolate",
    label="extrapolated from two steps",
    symbol="/",
    colour="#b5d99c",
    terminal_colour="blue",
    effort=0.0,
    outputs_read=2,
    weights=output_weights,
    factors=change_factors,
    combine=lambda outputs, factors: outputs[0] + (outputs[0] - outputs[1]) * factors[0],
    reference=lambda history, step: curve(history[-2:], step),
)
Strategy.EXTRAPOLATE_QUADRATIC = Strategy(
    name="extrapolate-quadratic",
    label="extrapolated from three steps",
    symbol="~",
    colour="#009e73",
    terminal_colour="blue",
    effort=0.0,
    outputs_read=3,
    weights=output_weights,
    factors=change_factors,
    combine=lambda outputs, factors: (
        outputs[0] + (outputs[0] - outputs[1]) * factors[0] + (outputs[1] - outputs[2]) * factors[1]
    ),
    reference=lambda history, step: curve(history[-3:], step),
)

STRATEGIES: tuple[Strategy, ...] = (
    Strategy.FULL,
    Strategy.WINDOW,
    Strategy.SHARE_STEP,
    Strategy.SHARE_CFG,
    Strategy.WINDOW_SHARE_CFG,
    Strategy.SHARE_CFG_REFRESH,
    Strategy.EXTRAPOLATE,
    Strategy.EXTRAPOLATE_QUADRATIC,
)


def _fitted(outputs: int) -> Strategy:
    return Strategy(
        name=f"fitted-{outputs}",
        label="step skipped, output fitted",
        symbol=str(outputs),
        colour="#cc79a7",
        terminal_colour="bright_blue",
        effort=0.0,
        outputs_read=outputs,
        fitted=True,
        combine=_weighted_sum,
    )


def _weighted_sum(terms: Sequence[Any], factors: Sequence[Any]) -> Any:
    first, *others = (term * factor for term, factor in zip(terms, factors, strict=True))
    return reduce(add, others, first)


def fitted_terms(outputs: int, both_branches: bool) -> int:
    """Return of how many terms a fitted output is the sum, in each guidance branch.

    The terms are the latent, and each earlier output, the last one first. Where a call holds
    ``both_branches``, they are the conditional and the unconditional half of each output.
    """
    return 1 + outputs * (1 + both_branches)


FITTED: tuple[Strategy, ...] = tuple(map(_fitted, (1, 2, 3, 4)))  # by how many outputs are read


def strategies() -> tuple[Strategy, ...]:
    """Return the table: what any site may take."""
    return STRATEGIES


def every_strategy() -> tuple[Strategy, ...]:
    """Return the table, and what only the model's whole output may take."""
    return (*strategies(), *FITTED)


def computing(windowed: bool, shares_guidance: bool) -> Strategy:
    """Return the first strategy of the table that computes an output in this way.

    Raises:
        LookupError: there is none.
    """
    for each in strategies():
        alike = (each.windowed, each.shares_guidance) == (windowed, shares_guidance)
        if each.computes and alike:
            return each
    raise LookupError(f"no strategy computes with {windowed=}, {shares_guidance=}")


def names_of(rows: Sequence[Sequence[Strategy]]) -> list[list[str]]:
    """Return the names of the strategies of ``rows``, as JSON holds them."""
    return [[strategy.name for strategy in row] for row in rows]


def strategy_named(name: object) -> Strategy:
    """Return the strategy called ``name``.

    Raises:
        ValueError: there is none.
    """
    for strategy in every_strategy():
        if strategy.name == name:
            return strategy
    known = ", ".join(map(str, every_strategy()))
    raise ValueError(f"unknown strategy {name!r}, expected one of: {known}")
