"""Describe a site: its kind, where it is in the graph, and what is legal there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch

from ditfastattn.passes.windows.window import Window

# By step, guidance branch (in the order of the layout) and term; empty where nothing is fitted.
Coefficients = tuple[tuple[tuple[float, ...], ...], ...]

WHOLE_OUTPUT_ALONE = "coefficients are fitted to the model's whole output alone"
GUIDANCE_COMPARES = "guidance compares the halves of the whole output"
NOT_OF_BLOCKS = "the guidance branches begin a range of blocks with streams of their own"


class SiteKind(StrEnum):
    """Name what an attention site attends to, or a site that is not an attention."""

    SELF = "self"
    CROSS = "cross"
    JOINT = "joint"
    FEED_FORWARD = "feed-forward"
    BLOCKS = "blocks"  # a range of blocks: what they add to the hidden stream
    OUTPUT = "output"  # of the whole model: where it is reused, a step runs nothing else

    @property
    def holds_others(self) -> bool:
        """Return whether other sites lie within, and do nothing where this one is reused."""
        return self in (SiteKind.BLOCKS, SiteKind.OUTPUT)


class CacheDtype(StrEnum):
    """Name what caches may be kept in, to take less memory than in the model's dtype."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True)
class Site:
    """Describe one site of a captured graph: an attention, or a feed-forward as one head.

    ``node`` and ``exits`` name graph nodes; ``node`` is the attention, or where the feed-forward
    leaves. ``ordinal`` is the place among the model's calls of attention, or among its calls of
    linear with ``weight``, a feed-forward's last one; -1 where the model spells attention
    otherwise. ``text`` counts the keys before and after the image's, in joint attention; with
    ``text_queries`` they are queries too, else ``tokens`` counts the image's alone.
    ``grid`` is that of the image's tokens, time first, () where none is known; ``no_grid`` says
    why there is none. ``windows`` are the forms that fit, the one chosen is ``window``, 0 where
    none is legal: ``no_window`` says why. ``no_shared_guidance`` says why the halves of a batch
    cannot share this site, "" where they can.
    A group of the heads of another site, ``whole``, begins at ``first_head``; ``node`` of that one
    puts its groups together. ``cache_dtype`` is what a plan has its caches kept in.
    Of the whole output (see ``output_site``), ``latent`` names the input that is denoised, and
    ``latent_node`` its node; ``coefficients[step][branch]`` are the plan's, with the latent's
    factor first; ``no_fit`` says why there can be none.
    A range of blocks (see ``block_ranges``) lasts from one to the other of its ``ends``, which are
    sites; ``bases`` name the nodes that its ``exits`` go on from.
    """

    name: str
    ordinal: int
    node: str
    exits: tuple[str, ...]
    kind: SiteKind
    tokens: int
    heads: int
    head_dim: int
    grid: tuple[int, ...]
    window: Window
    windows: tuple[Window, ...] = ()
    text: tuple[int, int] = (0, 0)
    text_queries: bool = False
    no_window: str = ""
    no_shared_guidance: str = ""
    no_grid: str = ""
    no_fit: str = WHOLE_OUTPUT_ALONE
    latent: str = ""
    latent_node: str = ""
    coefficients: Coefficients = ()
    whole: Site | None = None
    first_head: int = 0
    ends: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()
    cache_dtype: CacheDtype | None = None
    weight: str = ""

    @property
    def image_tokens(self) -> int:
        """Return how many tokens are the image's."""
        return self.tokens - (sum(self.text) if self.text_queries else 0)

    @property
    def axes(self) -> str:
        """Name what the image's tokens run over: "space", "time", both, or "" where not known."""
        return {1: "time", 2: "space", 3: "time and space"}.get(len(self.grid), "")

    def with_caches_in(self, dtype: CacheDtype | None) -> Site:
        """Return this site, and what it is a group of, with caches kept in ``dtype``."""
        whole = self.whole and replace(self.whole, cache_dtype=dtype)
        return replace(self, cache_dtype=dtype, whole=whole)

    def kept_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return in what a cache keeps values of ``dtype``: never in a wider one."""
        if self.cache_dtype is None:
            return dtype
        kept: torch.dtype = getattr(torch, self.cache_dtype)
        return kept if kept.itemsize < dtype.itemsize else dtype


def range_name(first: str, last: str) -> str:
    """Return the name of the range of blocks from the site ``first`` to the site ``last``."""
    return f"{first}..{last}"


def with_wholes(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Return ``sites``, and after them each site all of whose heads are among their groups."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        if site.whole is not None:
            groups.setdefault(site.whole.name, []).append(site)
    known = {site.name for site in sites}
    wholes = [
        members[0].whole
        for name, members in groups.items()
        if members[0].whole is not None and name not in known
        if sum(site.heads for site in members) == members[0].whole.heads
    ]
    return (*sites, *wholes)


def attentions(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Return the sites that are attentions: what DiTFastAttn itself shares."""
    return tuple(site for site in sites if site.kind is not SiteKind.FEED_FORWARD)
