"""Methods of cache-dit."""

from __future__ import annotations

import importlib
import os
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

from ditfastattn.tools.bench.peers.base import THRESHOLDS, Options, Peer, Scope, Subject, thresholds


def _cache_dit(subject: Subject, options: Options, taylor_order: int = 0) -> Scope:
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # read when it is imported
    library: Any = importlib.import_module("cache_dit")
    transformer = subject.transformer
    calibrator = (
        library.TaylorSeerCalibratorConfig(taylorseer_order=taylor_order) if taylor_order else None
    )
    config = library.DBCacheConfig(
        Bn_compute_blocks=0, num_inference_steps=subject.steps, **options
    )
    library.enable_cache(transformer, cache_config=config, calibrator_config=calibrator)

    @contextmanager
    def scope() -> Generator[None]:
        library.refresh_context(transformer)
        yield

    return scope


_SETTINGS = partial(thresholds, "residual_diff_threshold", Fn_compute_blocks=1, max_warmup_steps=3)

PEERS: tuple[Peer, ...] = (
    Peer(
        "cache-dit",
        _cache_dit,
        _SETTINGS(*THRESHOLDS),
        _SETTINGS(0.0)[0],
        library="cache_dit",
    ),
    Peer(
        "cache-dit-taylorseer",
        partial(_cache_dit, taylor_order=1),
        _SETTINGS(*THRESHOLDS),
        _SETTINGS(0.0)[0],
        library="cache_dit",
    ),
)
