"""Apply the caching libraries that a user could pick instead, each with a sweep of settings.

A peer's library is imported when the peer is applied, so that one that is absent costs that peer
alone. Where a library does not know a model by itself, it is told what its documentation tells a
user to tell it: which modules to cache, which timestep it is, which half is unconditional.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ditfastattn.core.errors import ConfigError

Options = Mapping[str, Any]
Scope = Callable[[], AbstractContextManager[None]]  # entered around each generation

_WIDE = (-1, 1001)  # every timestep
_BLOCKS = r"\w*blocks\.\d+"


@dataclass(frozen=True)
class Setting:
    """Hold one point of a peer's sweep."""

    label: str
    options: Options


@dataclass
class Clock:
    """Hold the timestep of the call under way."""

    timestep: int = 0


@dataclass
class Subject:
    """Hold what a peer is applied to: a copy of a transformer, which it changes in place.

    Attributes:
        transformer: the copy.
        steps: sampler steps.
        guided: whether guidance doubles the batch.
        clock: tells the timestep.
        calibration: what the peer's own calibration returned.
    """

    transformer: torch.nn.Module
    steps: int
    guided: bool = True
    clock: Clock = field(default_factory=Clock)
    calibration: Any = None


@dataclass(frozen=True)
class Peer:
    """Describe a caching library's method.

    Attributes:
        name: its name in options and records.
        apply: changes a subject's transformer; returns what each generation runs in, which forgets
            the one before.
        settings: the sweep, gentle to strong.
        dense: a setting at which the method computes everything.
        library: what it is imported from.
        inside: whether its hooks sit inside the blocks, not around them.
        reads_timestep: whether it asks ``Subject.clock``.
        unconditional_first: whether it takes guidance's halves in this order only.
        calibrate: measures, given the scope of a calibrating generation and a function that runs
            it, what the method needs to know of the model; JSON data.
    """

    name: str
    apply: Callable[[Subject, Options], Scope]
    settings: tuple[Setting, ...]
    dense: Setting
    library: str = "diffusers"
    inside: bool = False
    reads_timestep: bool = False
    unconditional_first: bool = False
    calibrate: Callable[[Subject, Callable[[Scope], None]], Any] | None = None


def _hooks() -> Any:
    return importlib.import_module("diffusers.hooks")


def _hooked(transformer: torch.nn.Module) -> Scope:
    """Return the scope of a generation under diffusers' hooks: its state is new."""

    @contextmanager
    def scope() -> Generator[None]:
        hooks: Any = importlib.import_module("diffusers.hooks.hooks")
        mixin: Any = importlib.import_module("diffusers.models.cache_utils").CacheMixin
        hooks.HookRegistry.check_if_exists_or_initialize(transformer).reset_stateful_hooks()
        # Any module will do, and one that guides in a batch has one context.
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
        # The paper's: from 0 to 1 over the generation.
        attention_weight_callback=lambda _: 1.0 - subject.clock.timestep / 1000.0,
        tensor_format="BCHW",
        is_guidance_distilled=not subject.guided,
        _unconditional_conditional_input_kwargs_identifiers=batched,
        **options,
    )
    # It warns that it is experimental, once per application.
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
    """Return how the residual's magnitude changes from step to step, over a dense generation."""
    # At the last step it would print the ratios and forget them: leave that step out.
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


def _thresholds(name: str, *values: float, **others: Any) -> tuple[Setting, ...]:
    return tuple(Setting(f"threshold {value:g}", {name: value, **others}) for value in values)


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


_THRESHOLDS = (0.03, 0.05, 0.07, 0.09, 0.11, 0.14, 0.2)
_DB = partial(_thresholds, "residual_diff_threshold", Fn_compute_blocks=1, max_warmup_steps=3)
_TAYLORS = (
    *((2, 8, 1), (2, 3, 1), (2, 1, 1), (3, 3, 1), (3, 3, 2)),
    *((4, 3, 1), (5, 3, 1), (6, 3, 1), (8, 3, 1)),
)
_DENSE_TAYLOR = _taylors((1, 0, 1))[0]

PEERS: tuple[Peer, ...] = (
    Peer(
        "cache-dit",
        _cache_dit,
        _DB(*_THRESHOLDS),
        _DB(0.0)[0],
        library="cache_dit",
    ),
    Peer(
        "cache-dit-taylorseer",
        partial(_cache_dit, taylor_order=1),
        _DB(*_THRESHOLDS),
        _DB(0.0)[0],
        library="cache_dit",
    ),
    Peer(
        "first-block",
        _first_block,
        _thresholds("threshold", *_THRESHOLDS),
        _thresholds("threshold", 0.0)[0],
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
        "taylorseer-lite",  # the library's lite mode, which knows the last layer by one name alone
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


def peers_named(names: str) -> tuple[Peer, ...]:
    """Return the peers that ``names`` lists with commas; ``all`` and ``none`` are lists too.

    Raises:
        ConfigError: a peer is unknown.
    """
    if names in ("all", "none"):
        return PEERS if names == "all" else ()
    known = {peer.name: peer for peer in PEERS}
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise ConfigError(
                "there is no such peer",
                where="--peers",
                got=name,
                expected=", ".join([*known, "all", "none"]),
            )
    return tuple(known[name] for name in wanted)
