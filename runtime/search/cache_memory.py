"""Say before a search what caches can take, and what the device has."""

from __future__ import annotations

import logging

import torch

from ditfastattn.core.memory import available_memory
from ditfastattn.passes.graph.ir import find, value
from ditfastattn.runtime.search.measure.session import Session

log = logging.getLogger(__name__)


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on ``device``."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return available_memory()


def kept_bytes(session: Session) -> int:
    """Return the bytes of one output of each site, for one image."""
    graph = session.captured.module.graph
    outputs = {site.node: (site, value(find(graph, site.node))) for site in session.sites}
    return sum(
        item.numel() * site.kept_dtype(item.dtype).itemsize for site, item in outputs.values()
    )


def say_what_caches_take(session: Session, cap: int) -> None:
    """Log what a plan that repeats every site keeps, and warn if the device has less.

    Args:
        session: what is searched.
        cap: the most bytes that the search may let caches take; 0 is no cap.
    """
    needed, free = kept_bytes(session), free_memory(session.example[0].device)
    told = "ditfastattn: the outputs of all sites take %d MiB for one image; %d MiB are free"
    if (min(needed, cap) if cap else needed) <= free:
        log.info(told, needed >> 20, free >> 20)
    else:
        log.warning(
            told + ": cap what plans keep with max_cache_mb (--max-cache-mb)",
            *(needed >> 20, free >> 20),
        )
