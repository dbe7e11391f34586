"""Define the base of everything that is written as JSON and read back."""

from __future__ import annotations

import math
from typing import Any, Self

from pydantic import BaseModel, ValidationError, field_validator

from ditfastattn.core.errors import ConfigError

_SHOWN = 120  # characters of a value in a message


# An infinite PSNR is written as "Infinity": JSON has no such number.
class Record(BaseModel, frozen=True, extra="forbid", ser_json_inf_nan="strings"):
    """Hold fields that are checked on reading; an unknown one is refused."""

    @field_validator("*", mode="after")
    @classmethod
    def _is_a_number(cls, value: Any) -> Any:
        if isinstance(value, float) and math.isnan(value):
            raise ValueError("NaN is not a number")
        return value

    @classmethod
    def from_json(cls, data: Any, where: str, remedy: str) -> Self:
        """Return the record of JSON ``data``.

        Raises:
            ConfigError: a field is missing, unknown or not valid.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part)[:_SHOWN] for part in first["loc"])
            got = repr(first.get("input"))
            raise ConfigError(
                first["msg"],
                where=f"{where}: {place}" if place else where,
                got=got if len(got) <= _SHOWN else f"{got[: _SHOWN - 3]}...",
                remedy=remedy,
            ) from error
