"""Define what describes a site."""

from __future__ import annotations

from enum import StrEnum

# By step, guidance branch (in the order of the layout) and term; empty where nothing is fitted.
Coefficients = tuple[tuple[tuple[float, ...], ...], ...]

WHOLE_OUTPUT_ALONE = "coefficients are fitted to the model's whole output alone"
GUIDANCE_COMPARES = "guidance compares the halves of the whole output"


class SiteKind(StrEnum):
    """Name what an attention site attends to, or a site that is not an attention."""

    SELF = "self"
    CROSS = "cross"
    JOINT = "joint"
    FEED_FORWARD = "feed-forward"
    OUTPUT = "output"  # of the whole model: where it is reused, a step runs nothing else


class CacheDtype(StrEnum):
    """Name what caches may be kept in, to take less memory than in the model's dtype."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
