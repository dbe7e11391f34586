"""Read the arguments and the output of a call of a denoiser, and make an output of its kind."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ditfastattn.core.errors import ConfigError


def bound_arguments(
    kind: type[nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a call of a module of ``kind`` by name; defaults are left out."""
    names = list(inspect.signature(kind.forward).parameters)[1:]  # after self
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def by_name(
    kind: type[nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the same arguments by name, as far as the forward of ``kind`` names them.

    Dynamo calls what is given to a decorated forward by position ``args.0``.
    """
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]  # after self
    named = inspect.Parameter.POSITIONAL_OR_KEYWORD
    if len(args) > sum(one.kind is named for one in parameters):
        return tuple(args), dict(kwargs)
    return (), dict(zip((one.name for one in parameters), args, strict=False)) | dict(kwargs)


def output_of(result: Any) -> Tensor:
    """Return the one tensor in what a model has returned: alone, in a tuple, or by name.

    Raises:
        ConfigError: there are several, or none.
    """
    if isinstance(result, Tensor):
        return result
    items = list(result.values()) if isinstance(result, Mapping) else result
    if isinstance(items, Sequence) and len(items) == 1 and isinstance(items[0], Tensor):
        return items[0]
    raise ConfigError(
        "the model must return one tensor",
        where=type(result).__name__,
        got=f"{len(items)} items" if isinstance(items, Sequence) else type(result).__name__,
        remedy="whole steps need a model of one output",
    )


def with_output(result: Any, output: Tensor) -> Any:
    """Return what a model would return that returns ``output`` in the form of ``result``."""
    if isinstance(result, Tensor):
        return output
    if isinstance(result, Mapping):
        return type(result)(**{name: output for name in result})
    return type(result)([output])
