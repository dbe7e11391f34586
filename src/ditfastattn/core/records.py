"""Define the base of everything that is written as JSON and read back."""

from __future__ import annotations

from pydantic import BaseModel


# An infinite PSNR is written as "Infinity": JSON has no such number.
class Record(BaseModel, frozen=True, extra="forbid", ser_json_inf_nan="strings"):
    """Hold fields that are checked on reading; an unknown one is refused."""
