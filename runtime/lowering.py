"""Lower a step variant's graph to something that runs: Inductor, or plain eager for tests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule

from ditfastattn.passes.lower_window_attention import lower_window_attention

log = logging.getLogger(__name__)

RunnableGraph = Callable[[Sequence[Tensor]], Sequence[Any]]
_COMPILATIONS = 256  # of one model in one process; Dynamo's 8 are used up by a few plans


class Lowering(StrEnum):
    """Name the code generator of the step variants."""

    INDUCTOR = "inductor"
    EAGER = "eager"


def lower(
    module: GraphModule, args: Sequence[Tensor], lowering: Lowering, inductor: dict[str, Any]
) -> RunnableGraph:
    """Return a callable over the flat inputs of ``module``; ``args`` are an example of them.

    ``inductor`` holds Inductor's own configuration, as ``torch.compile(options=...)`` takes it.
    """
    module.recompile()
    if lowering is Lowering.EAGER:
        return lambda inputs: module(*inputs)
    for reason in lower_window_attention(module):
        log.info("window attention stays a masked full attention: %s", reason)
    with torch.no_grad():
        compiled: Any = compile_fx(module, list(args), config_patches=inductor or None)
    return lambda inputs: compiled(*inputs)


@contextmanager
def many_compilations() -> Generator[None]:
    """Let Dynamo compile one model for many plans.

    At its limit Dynamo would go on uncompiled, dense, and what is measured would not be what was
    asked for.
    """
    with torch._dynamo.config.patch(recompile_limit=_COMPILATIONS):
        yield
