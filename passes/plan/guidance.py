"""How the two guidance branches, conditional and unconditional, reach the model."""

from __future__ import annotations

from enum import Enum, StrEnum


class CfgLayout(StrEnum):
    """Name how the guidance branches reach the model: along the batch, or call by call."""

    NONE = "none"  # one branch only: sharing guidance is not legal
    COND_FIRST = "cond-first"
    UNCOND_FIRST = "uncond-first"
    SEPARATE = "separate"  # two calls per step, the conditional one first
    SEPARATE_UNCOND_FIRST = "separate-uncond-first"  # the second call cannot serve the first

    @property
    def calls(self) -> int:
        """Return how many times a step calls the model."""
        return 2 if self in (CfgLayout.SEPARATE, CfgLayout.SEPARATE_UNCOND_FIRST) else 1

    @property
    def branches(self) -> int:
        """Return how many guidance branches there are."""
        return 1 if self is CfgLayout.NONE else 2

    @property
    def batched(self) -> bool:
        """Return whether the halves of a call's batch are the guidance branches."""
        return self in (CfgLayout.COND_FIRST, CfgLayout.UNCOND_FIRST)

    @property
    def conditional_half(self) -> int:
        """Return which half of a batch of both branches is the conditional one's."""
        return int(self is CfgLayout.UNCOND_FIRST)

    @property
    def conditional_call(self) -> int:
        """Return which of a step's calls holds the conditional branch."""
        return int(self is CfgLayout.SEPARATE_UNCOND_FIRST)


class GuidanceCall(Enum):
    """Name which of a step's calls of the model something is for."""

    ONLY = "only"
    FIRST = "first"
    SECOND = "second"


def calls_of(layout: CfgLayout) -> tuple[GuidanceCall, ...]:
    """Return a step's calls in order."""
    both = (GuidanceCall.FIRST, GuidanceCall.SECOND)
    return both if layout.calls == 2 else (GuidanceCall.ONLY,)
