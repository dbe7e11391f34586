"""Methods of diffusers' own caching hooks."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ditfastattn.tools.bench.peers.base import (
    THRESHOLDS,
    Options,
    Peer,
    Scope,
    Setting,
    Subject,
    thresholds,
)

_WIDE = (-1, 1001)  # every timestep
_BLOCKS = r"\w*blocks\.\d+"


def _hooks() -> Any:
    return importlib.import_module("diffusers.hooks")


def _hooked(transformer: torch.nn.Module) -> Scope:
    """Return the context of a generation under diffusers' hooks: it resets their state."""

    @contextmanager
    def scope() -> Generator[None]:
        hooks: Any = importlib.import_module("diffusers.hooks.hooks")
        mixin: Any = importlib.import_module("diffusers.models.cache_utils").CacheMixin
        hooks.HookRegistry.check_if_exists_or_initialize(transformer).reset_stateful_hooks()
        # Works on any module. With batched guidance there is one cache context.
        with mixin.cache_context(transformer, "generation"):
            yield

    return scope


def _first_block(subject: Subject, options: Options) -> Scope:
    config = _hooks().FirstBlockCacheConfig(**options)
    _hooks().apply_first_block_cache(subject.transformer, config)
    return _hooked(subject.transformer)


def _pyramid(subject: Subject, options: Options) -> Scope:
    config = _hooks().PyramidAttentionBroadcastConfig(
        current_timestep_callback=lambda: subject.clock.timestep, **options
    )
    _hooks().apply_pyramid_attention_broadcast(subject.transformer, config)
    return _hooked(subject.transformer)


def _faster(subject: Subject, options: Options) -> Scope:
    batched = ("hidden_states", "encoder_hidden_states", "timestep", "class_labels")
    config = _hooks().FasterCacheConfig(
        current_timestep_callback=lambda: subject.clock.timestep,
        # As in the paper: from 0 to 1 over the generation.
        attention_weight_callback=lambda _: 1.0 - subject.clock.timestep / 1000.0,
        tensor_format="BCHW",
        is_guidance_distilled=not subject.guided,
        _unconditional_conditional_input_kwargs_identifiers=batched,
        **options,
    )
    # Each application warns that it is experimental.
    logging.getLogger("diffusers.hooks.faster_cache").setLevel(logging.ERROR)
    _hooks().apply_faster_cache(subject.transformer, config)
    return _hooked(subject.transformer)


def _taylorseer(subject: Subject, options: Options, cached: str, skipped: str = "") -> Scope:
    config = _hooks().TaylorSeerCacheConfig(
        cache_identifiers=[cached],
        skip_predict_identifiers=[skipped] if skipped else None,
        taylor_factors_dtype=next(subject.transformer.parameters()).dtype,
        **options,
    )
    _hooks().apply_taylorseer_cache(subject.transformer, config)
    return _hooked(subject.transformer)


def _mag(subject: Subject, options: Options) -> Scope:
    config = _hooks().MagCacheConfig(
        num_inference_steps=subject.steps, mag_ratios=subject.calibration, **options
    )
    _hooks().apply_mag_cache(subject.transformer, config)
    return _hooked(subject.transformer)


def _mag_ratios(subject: Subject, generate: Callable[[Scope], None]) -> list[float]:
    """Return the ratios of the residual's magnitude between steps of a dense generation."""
    # At the last step the hook prints the ratios and clears them: announce one more step.
    config = _hooks().MagCacheConfig(num_inference_steps=subject.steps + 1, calibrate=True)
    _hooks().apply_mag_cache(subject.transformer, config)
    hooked = _hooked(subject.transformer)
    ratios: list[float] = []

    @contextmanager
    def scope() -> Generator[None]:
        with hooked():
            yield
            ratios.extend(_mag_state(subject.transformer).calibration_ratios)

    generate(scope)
    return ratios


def _mag_state(transformer: torch.nn.Module) -> Any:
    name = importlib.import_module("diffusers.hooks.mag_cache")._MAG_CACHE_LEADER_BLOCK_HOOK
    registries = (getattr(module, "_diffusers_hook", None) for module in transformer.modules())
    hooks = (registry.get_hook(name) for registry in registries if registry is not None)
    return next(hook for hook in hooks if hook is not None).state_manager.get_state()


def _pyramids(*pairs: tuple[int, tuple[int, int]]) -> tuple[Setting, ...]:
    return tuple(
        Setting(
            f"every {interval}, timesteps {low} to {high}",
            {
                "spatial_attention_block_skip_range": interval,
                "spatial_attention_timestep_skip_range": (low, high),
                "cross_attention_block_skip_range": interval,
                "cross_attention_timestep_skip_range": (low, high),
            },
        )
        for interval, (low, high) in pairs
    )


def _fasters(*triples: tuple[int, int, tuple[int, int]]) -> tuple[Setting, ...]:
    return tuple(
        Setting(
            f"attention every {attention}, unconditional every {unconditional}, "
            f"timesteps {low} to {high}",
            {
                "spatial_attention_block_skip_range": attention,
                "spatial_attention_timestep_skip_range": (low, high),
                "unconditional_batch_skip_range": unconditional,
                "unconditional_batch_timestep_skip_range": (low, high),
            },
        )
        for attention, unconditional, (low, high) in triples
    )


def _taylors(*triples: tuple[int, int, int]) -> tuple[Setting, ...]:
    return tuple(
        Setting(
            f"every {interval} after {before}, order {order}",
            {
                "cache_interval": interval,
                "disable_cache_before_step": before,
                "max_order": order,
            },
        )
        for interval, before, order in triples
    )


def _mags(*triples: tuple[float, int, float]) -> tuple[Setting, ...]:
    return tuple(
        Setting(
            f"threshold {threshold:g}, at most {skipped} steps, retention {retention:g}",
            {
                "threshold": threshold,
                "max_skip_steps": skipped,
                "retention_ratio": retention,
            },
        )
        for threshold, skipped, retention in triples
    )


_TAYLORS = (
    *((2, 8, 1), (2, 3, 1), (2, 1, 1), (3, 3, 1), (3, 3, 2)),
    *((4, 3, 1), (5, 3, 1), (6, 3, 1), (8, 3, 1)),
)
_DENSE_TAYLOR = _taylors((1, 0, 1))[0]

PEERS: tuple[Peer, ...] = (
    Peer(
        "first-block",
        _first_block,
        thresholds("threshold", *THRESHOLDS),
        thresholds("threshold", 0.0)[0],
    ),
    Peer(
        "faster-cache",
        _faster,
        _fasters(
            (2, 2, (-1, 681)),
            (2, 3, (-1, 681)),
            (2, 5, (-1, 681)),
            (2, 3, _WIDE),
            (2, 5, _WIDE),
            (3, 5, _WIDE),
        ),
        _fasters((1, 1, _WIDE))[0],
        inside=True,
        reads_timestep=True,
        unconditional_first=True,
    ),
    Peer(
        "pyramid",
        _pyramid,
        _pyramids((2, (100, 800)), (2, _WIDE), (3, (100, 800)), (3, _WIDE), (4, _WIDE), (6, _WIDE)),
        _pyramids((1, _WIDE))[0],
        inside=True,
        reads_timestep=True,
    ),
    Peer(
        "taylorseer",
        partial(_taylorseer, cached=rf"{_BLOCKS}\.(attn\d?|ff|ff_context)"),
        _taylors(*_TAYLORS),
        _DENSE_TAYLOR,
        inside=True,
    ),
    Peer(
        "taylorseer-lite",  # the library's lite mode recognises one name of the last layer only
        partial(_taylorseer, cached=r"proj_out(_2)?", skipped=_BLOCKS),
        _taylors(*_TAYLORS),
        _DENSE_TAYLOR,
    ),
    Peer(
        "mag-cache",
        _mag,
        _mags(
            (0.015, 1, 0.2),
            (0.03, 1, 0.2),
            (0.03, 2, 0.2),
            (0.06, 2, 0.2),
            (0.09, 3, 0.2),
            (0.12, 3, 0.2),
            (0.24, 4, 0.1),
            (0.5, 6, 0.1),
        ),
        _mags((0.0, 0, 1.0))[0],
        calibrate=_mag_ratios,
    ),
)
