"""Turn the name of a choice, as a caller gives it, into the choice."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar

from ditfastattn.core.errors import ConfigError

Choice = TypeVar("Choice", bound=StrEnum)


def choice_named(kind: type[Choice], given: object, where: str) -> Choice:
    """Return the member of ``kind`` that ``given`` is or names; ``where`` it was given.

    Raises:
        ConfigError: there is none.
    """
    if given not in set(kind):
        raise ConfigError(
            "the option has a value it cannot take",
            where=where,
            got=repr(given),
            expected=", ".join(kind),
        )
    return kind(str(given))
