"""The backend ``"ditfastattn"`` of ``torch.compile``, registered via an entry point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

from ditfastattn.runtime.dynamo_adapter import PlannedFunction
from ditfastattn.runtime.lowering import expect_many_compilations
from ditfastattn.runtime.options import parse_options


def ditfastattn(
    module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> PlannedFunction:
    """Compile one Dynamo graph of a diffusion transformer.

    Args:
        module: the graph as Dynamo captured it.
        example_inputs: unused; shapes are taken from the first call.
        options: see ``ditfastattn.runtime.options.BackendOptions``.
        mode: a mode of ``torch.compile``, passed on to Inductor.

    Raises:
        ConfigError: an option is wrong, or the plan cannot be read.
    """
    expect_many_compilations()  # Dynamo's limit of 8 would let the ninth plan run dense
    return PlannedFunction(module, parse_options(options, mode))
