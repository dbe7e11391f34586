"""Record a site of a model in a plan."""

from __future__ import annotations

from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.plan.schema import HeadGroup, PlannedSite


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
