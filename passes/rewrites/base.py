"""Say what a pass is: a frozen record of options that rewrites a graph in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch.fx import GraphModule


@dataclass(frozen=True)
class PassResult:
    """Report a pass: how many rewrites it made, and why it left candidates alone."""

    changed: int
    declined: tuple[str, ...] = ()


class Pass(Protocol):
    """Rewrite a graph; the runner, not the pass, verifies, logs and dumps it."""

    @property
    def name(self) -> str:
        """Return the name that logs and the disable knob use."""
        ...

    def run(self, module: GraphModule) -> PassResult:
        """Rewrite ``module`` in place."""
        ...
