"""Say to how many tokens a pipeline's text is padded before the model sees it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ditfastattn.core.records import Record


class PaddedText(Record, frozen=True):
    """Describe text that is padded with zeros, which a mask hides.

    Attributes:
        argument: the model's argument that is padded, ``[B, tokens, width]``.
        mask: its argument ``[B, tokens]`` that hides tokens.
        length: the number of tokens that both are padded to.
    """

    argument: str
    mask: str
    length: Annotated[int, Field(gt=0)]
