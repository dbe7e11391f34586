"""A pipeline's second transformer, in the place of its first: each runs by a plan of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from ditfastattn.core.errors import ConfigError

_OWN = ("transformer", "transformer_2")


class SecondTransformer:
    """Stand for a pipeline whose ``transformer`` is the one that takes over its low-noise steps.

    All else is the pipeline's own. What is set here is set there.
    """

    def __init__(self, pipeline: Any) -> None:
        """Take the pipeline."""
        vars(self)["_pipeline"] = pipeline

    def __getattr__(self, name: str) -> Any:
        """Return what the pipeline has by ``name``; there is no third transformer."""
        if name.startswith("__") or name == "_pipeline":
            raise AttributeError(name)
        if name == _OWN[1]:
            return None
        return getattr(self._pipeline, _OWN[1] if name == _OWN[0] else name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Give the pipeline ``value``."""
        setattr(self._pipeline, _OWN[1] if name == _OWN[0] else name, value)

    @property
    def __call__(self) -> Any:
        """Run a generation: this is the pipeline's own call, with its signature."""
        return self._pipeline.__call__


def whole_pipeline(pipeline: Any) -> Any:
    """Return the pipeline itself, where ``pipeline`` stands for it."""
    return pipeline._pipeline if isinstance(pipeline, SecondTransformer) else pipeline


def second_transformer(pipeline: Any) -> Any:
    """Return ``pipeline`` with its ``transformer_2`` in the place of its ``transformer``.

    Pipelines of two experts (Wan 2.2 A14B) call one transformer at the first, noisy steps and
    another one at the rest. Each has a plan and a clock of its own, and either may be absent::

        second = ditfastattn.second_transformer(pipeline)
        plans = ditfastattn.calibrate(pipeline, call), ditfastattn.calibrate(second, call)
        ditfastattn.accelerate(pipeline, plans[0])
        ditfastattn.accelerate(second, plans[1])

    Args:
        pipeline: a diffusers pipeline with a ``transformer_2``.

    Returns:
        What ``calibrate``, ``validate``, ``accelerate`` and ``restore`` take for that transformer.

    Raises:
        ConfigError: the pipeline has no ``transformer_2``.
    """
    if not isinstance(getattr(pipeline, _OWN[1], None), nn.Module):
        raise ConfigError(
            "the pipeline has no second transformer",
            where="second_transformer(pipeline)",
            got=type(pipeline).__name__,
            expected="a diffusers pipeline with a `transformer_2` module",
        )
    return SecondTransformer(pipeline)
