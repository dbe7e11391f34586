"""A site of a model, as a plan records it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, FiniteFloat, SerializerFunctionWrapHandler, model_serializer

from ditfastattn.core.records import Record
from ditfastattn.passes.analysis.site import (
    GUIDANCE_COMPARES,
    NOT_OF_BLOCKS,
    WHOLE_OUTPUT_ALONE,
    CacheDtype,
    Site,
    SiteKind,
)
from ditfastattn.passes.windows.window import Window


class HeadGroup(Record, frozen=True):
    """Say which heads of an attention a site is: those of ``site``, ``of`` in all, from ``first``.

    The site's own ``heads`` says how many.
    """

    site: str
    first: Annotated[int, Field(ge=0)]
    of: Annotated[int, Field(gt=1)]


class PlannedSite(Record, frozen=True):
    """Describe one site of the model a plan is for.

    ``tokens`` counts the queries; ``window`` counts tokens *per side* of the flattened sequence, or
    describes tiles; 0 where a window is not legal. A feed-forward is one head of its width. Where
    the heads of an attention take strategies of their own, a site is a ``group`` of them. Caches
    are kept in ``cache_dtype``, in the model's own dtype where there is none.

    The whole output of the model may be fitted at a step: ``coefficients[step]`` holds a row for
    each guidance branch, in the order of ``cfg_layout``: the factor of the latent, and those of
    the outputs computed last, the last one first. Where a call holds both branches, each output
    has two factors, one for each half. ``latent`` names the argument that is denoised.

    A range of blocks lasts from one to the other of the sites ``ends``.
    """

    name: str
    kind: SiteKind
    tokens: Annotated[int, Field(gt=0)]
    heads: Annotated[int, Field(gt=0)]
    head_dim: Annotated[int, Field(gt=0)]
    window: Window
    cache_dtype: CacheDtype | None = None
    group: HeadGroup | None = None
    coefficients: tuple[tuple[tuple[FiniteFloat, ...], ...], ...] = ()
    latent: str = ""
    ends: tuple[str, ...] = ()

    @model_serializer(mode="wrap")
    def _write(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out absent fields, so that older plans are written as they were."""
        fields: dict[str, Any] = write(self)
        return {name: item for name, item in fields.items() if item not in (None, (), [], "")}

    @property
    def no_window(self) -> str:
        """Return why no window is legal here, or ""."""
        return "" if self.window else "a window is not legal at this site (window is 0)"

    @property
    def no_shared_guidance(self) -> str:
        """Return "": only the model itself shows whether guidance can be shared."""
        reasons = {SiteKind.OUTPUT: GUIDANCE_COMPARES, SiteKind.BLOCKS: NOT_OF_BLOCKS}
        return reasons.get(self.kind, "")

    @property
    def no_fit(self) -> str:
        """Return why no coefficients can be fitted, or ""."""
        return "" if self.kind is SiteKind.OUTPUT else WHOLE_OUTPUT_ALONE


def planned_site(site: Site) -> PlannedSite:
    """Return what a plan records of ``site``."""
    whole = site.whole
    return PlannedSite(
        name=site.name,
        kind=site.kind,
        tokens=site.tokens,
        heads=site.heads,
        head_dim=site.head_dim,
        window=site.window,
        cache_dtype=site.cache_dtype,
        coefficients=site.coefficients,
        latent=site.latent,
        ends=site.ends,
        group=whole and HeadGroup(site=whole.name, first=site.first_head, of=whole.heads),
    )
