"""Describe what a search is for, so that another process can tell whether it may resume it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.pipeline.text_padding import padded_text
from ditfastattn.runtime.search.measure.session import Session
from ditfastattn.runtime.search.options import SearchOptions


def search_request(
    session: Session,
    call: Mapping[str, Any],
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    options: SearchOptions,
) -> dict[str, Any]:
    """Return, as JSON data, all that decides the result of a search."""
    target, text = options.target, padded_text(session.pipeline.transformer)
    return {
        "model": session.identity.model_dump(),
        "layout": session.layout,
        "text": text and text.model_dump(),
        "sites": [
            [site.name, *map(str, site.windows), str(site.cache_dtype)] for site in session.sites
        ],
        "call": {name: repr(item) for name, item in sorted(call.items())},
        "held_out": [{**prompt.call, "seed": prompt.seed} for prompt in held_out],
        "scheduler": session.sampler(session.timesteps).model_dump(include={"scheduler", "config"}),
        "target": f"{target.name} {'>=' if target.at_least else '<='} {target.bound:.12g}",
        "method": options.method,
        "objective": options.objective,
        "max_variants": options.max_variants,
        "max_cache_bytes": options.max_cache_bytes,
        "seed": options.seed,
        "torch": torch.__version__,
    }
