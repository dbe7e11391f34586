"""Copies of a pipeline that share its models, so that its generations can take turns.

A pipeline keeps what belongs to the generation under way in its own attributes and in its scheduler
(and guider), so two generations under way need two of each. Models are called and not changed.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.pipeline.generation_end import stop_watching

_ORIGINAL = "_ditfastattn_original"  # in a copy's dict: the pipeline that it was made of


def copied_pipeline(pipeline: Any) -> Any:
    """Return a copy of ``pipeline`` that shares its models, and nothing of a generation.

    Raises:
        ConfigError: the pipeline offloads its models as each generation ends, or methods were
            replaced by functions, which a copy would share with the state that they refer to.
    """
    if getattr(pipeline, "_all_hooks", None):
        raise ConfigError(
            "the pipeline moves its models to the CPU as each generation ends, while others are "
            "under way",
            where=type(pipeline).__name__,
            got="enable_model_cpu_offload()",
            expected="models that stay on the device",
            remedy="run one generation at a time, or do not offload",
        )
    made = copy.copy(pipeline)
    stop_watching(made)
    _check_methods(made)
    for name, item in list(vars(made).items()):
        if _has_state(name, item):
            _check_methods(item)
            vars(made)[name] = copy.deepcopy(item)
    vars(made)[_ORIGINAL] = original_of(pipeline)
    return made


def original_of(pipeline: Any) -> Any:
    """Return what ``pipeline`` was copied from by ``copied_pipeline``, or else itself."""
    return getattr(pipeline, "__dict__", {}).get(_ORIGINAL, pipeline)


def _has_state(name: str, item: Any) -> bool:
    """Return whether ``item`` changes in a generation: a scheduler, or a guider.

    Those are configured as models are, and are none.
    """
    if isinstance(item, nn.Module) or item is None:
        return False
    return name == "scheduler" or hasattr(type(item), "config_name")


def _check_methods(owner: Any) -> None:
    """Raise ``ConfigError`` if a method of ``owner`` was replaced in this very object."""
    for name, item in vars(owner).items():
        if callable(item) and callable(getattr(type(owner), name, None)):
            raise ConfigError(
                "a method was replaced by a function, which a copy would share",
                where=type(owner).__name__,
                got=f"{name} = {getattr(item, '__qualname__', type(item).__name__)}",
                expected="methods of the class",
                remedy="run one generation at a time, or override the method in a subclass",
            )
