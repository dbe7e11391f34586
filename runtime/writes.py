"""Tell whether a tensor was written to since it was last looked at."""

from __future__ import annotations

from typing import Final

from torch import Tensor

NOT_COUNTED: Final = -1


def counted_writes(tensor: Tensor) -> int:
    """Return the count of writes to ``tensor``; -1 in inference mode, which does not count them."""
    return NOT_COUNTED if tensor.is_inference() else tensor._version
