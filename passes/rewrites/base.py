"""Define a pass: a frozen record of options that rewrites a graph in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch.fx import GraphModule


@dataclass(frozen=True)
class PassResult:
    """Report what a pass did.

    Attributes:
        changed: how many changes it made, 0 only where the graph is as it was; the runner checks.
        declined: why it left candidates alone, one reason each.
    """

    changed: int
    declined: tuple[str, ...] = ()


class Pass(Protocol):
    """Rewrite a graph; the runner, not the pass, verifies, logs and dumps it."""

    @property
    def name(self) -> str:
        """Return the name used in logs and in ``DITFASTATTN_DISABLE``."""
        ...

    @property
    def requires(self) -> tuple[str, ...]:
        """Return the names of earlier passes whose results this one reads.

        It does not run where one of them is switched off.
        """
        ...

    def run(self, module: GraphModule) -> PassResult:
        """Rewrite ``module`` in place."""
        ...
