"""Before a search, what caches can take is compared with what the device has free."""

from __future__ import annotations

import logging

import pytest
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search import cache_memory
from ditfastattn.runtime.search.cache_memory import kept_bytes, say_what_caches_take
from ditfastattn.runtime.search.measure.session import open_session
from tests.helpers import tiny_digits_pipeline

SITE_BYTES = 2 * 64 * 16 * 4  # two branches of guidance, 64 tokens of 16 channels, fp32
CALL = {"class_labels": [1], "num_inference_steps": 2}


def test_a_search_warns_where_the_device_has_less_than_caches_can_take(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = tiny_digits_pipeline(DDIMScheduler(clip_sample=False))
    with open_session(pipeline, Prompt(CALL, 0)) as session:
        needed = kept_bytes(session)
        assert needed == len(session.sites) * SITE_BYTES
        for free, cap, level in (
            (needed, 0, logging.INFO),
            (needed - 1, 0, logging.WARNING),
            (needed - 1, needed - 1, logging.INFO),
        ):
            monkeypatch.setattr(cache_memory, "available_memory", lambda free=free: free)
            caplog.clear()
            with caplog.at_level(logging.INFO):
                say_what_caches_take(session, cap)
            (record,) = caplog.records
            assert record.levelno == level
            assert ("--max-cache-mb" in record.getMessage()) == (level == logging.WARNING)
