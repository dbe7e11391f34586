"""Find again in a graph the sites that hold others: ranges of blocks, and the whole output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ditfastattn.passes.analysis.block_ranges import BlockRanges
from ditfastattn.passes.analysis.output_site import output_site
from ditfastattn.passes.analysis.site import Site, SiteKind
from ditfastattn.passes.capture.captured_graph import CapturedGraph


class Wanted(Protocol):
    """What identifies such a site in any graph of the model."""

    @property
    def kind(self) -> SiteKind:
        """Return the kind of the site."""
        ...

    @property
    def ends(self) -> tuple[str, ...]:
        """Return the first and the last site of a range of blocks."""
        ...

    @property
    def latent(self) -> str:
        """Return which input is denoised, of the whole output."""
        ...


def coarse_sites(
    wanted: Sequence[Wanted], captured: CapturedGraph, sites: Sequence[Site]
) -> tuple[Site, ...]:
    """Return those of ``wanted`` that hold others, as they are in ``captured``.

    Args:
        wanted: sites of a plan, of all kinds.
        captured: the graph.
        sites: all that it has, of the other kinds.

    Raises:
        ValueError: there is no such site.
    """
    holding = [each for each in wanted if each.kind.holds_others]
    blocks = any(each.kind is SiteKind.BLOCKS for each in holding)
    ranges = BlockRanges(captured, sites) if blocks else None
    return tuple(
        output_site(captured, each.latent)
        if ranges is None or each.kind is SiteKind.OUTPUT
        else ranges.site(*each.ends)
        for each in holding
    )
