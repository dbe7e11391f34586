"""Trace a graph by ``torch.export``, and pass it to another process as a file.

The file holds no weights: a compiler needs their shapes and dtypes alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from ditfastattn.core.errors import ConfigError


def traced(
    module: GraphModule,
    examples: Sequence[Tensor],
    dims: Sequence[dict[int, Any]] | None = None,
    remedy: str = "report a bug",
) -> ExportedProgram:
    """Return ``module`` as ``torch.export`` traces it for ``examples``; ``dims`` are free sizes.

    Raises:
        ConfigError: torch cannot trace it; ``remedy`` says what to do then.
    """
    try:
        with torch.no_grad():
            return torch.export.export(
                module, tuple(examples), dynamic_shapes=None if dims is None else tuple(dims)
            )
    except Exception as error:  # torch.export raises what its tracing meets
        raise ConfigError(
            "torch cannot trace this graph" + (" with a free batch" if dims else ""),
            where="export(format='pt2')",
            got=str(error).strip()[:2000],
            remedy=remedy,
        ) from error


def graph_of(program: ExportedProgram) -> GraphModule:
    """Return the graph of ``program``, with its weights; it does not check its inputs."""
    found = program.module(check_guards=False)
    assert isinstance(found, GraphModule)
    return found


def save_program(program: ExportedProgram, path: Path) -> None:
    """Write ``program`` to ``path`` without the content of its weights and example inputs."""
    with _without_content(program), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No complete tensor found")  # as it should be
        torch.export.save(program, path)


def load_program(path: Path) -> ExportedProgram:
    """Return the program at ``path``; its tensors are zeros, of which no page is touched."""
    program = torch.export.load(path)
    for held in (program.state_dict, program.constants):
        held.update({name: _zeros(item) for name, item in _tensors(held)})
    program.example_inputs = tuple(map(_zeros, example_inputs(program))), {}
    return program


def example_inputs(program: ExportedProgram) -> tuple[Tensor, ...]:
    """Return what ``program`` was traced with."""
    assert program.example_inputs is not None
    inputs: tuple[Tensor, ...] = program.example_inputs[0]
    return inputs


@contextmanager
def _without_content(program: ExportedProgram) -> Generator[None]:
    """Give ``program`` tensors of one element, expanded, for as long as the context is open."""
    places, inputs = (program.state_dict, program.constants), example_inputs(program)
    kept = [dict(held) for held in places]
    try:
        for held in places:
            held.update({name: _hollow(item) for name, item in _tensors(held)})
        program.example_inputs = tuple(map(_hollow, inputs)), {}
        yield
    finally:
        program.example_inputs = inputs, {}
        for held, before in zip(places, kept, strict=True):
            held.update(before)


def _hollow(tensor: Tensor) -> Tensor:
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def _tensors(held: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    return [(name, item) for name, item in held.items() if isinstance(item, Tensor)]
