"""Compare what a model is called with beside tensors: its graphs hold for these values alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from pydantic import FiniteFloat
from torch.utils import _pytree as pytree

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.capture.plain_tensors import path_names

Setting = bool | int | FiniteFloat | str
Settings = dict[str, Setting]

_OF_THE_RESULT: Final = "return_dict"  # a bundle answers both ways


def settings_of(arguments: Mapping[str, Any]) -> Settings:
    """Return the numbers, texts and flags among ``arguments``: ``sizes.0.1`` lies in a list.

    ``None`` is not among them: an argument that is left out is as it was exported.
    """
    found: Settings = {}
    for path, leaf in pytree.tree_flatten_with_path(dict(arguments))[0]:
        names = path_names(path)
        if names[0] == _OF_THE_RESULT or not isinstance(leaf, (bool, int, float, str)):
            continue
        lasting = not isinstance(leaf, float) or math.isfinite(leaf)
        found[".".join(names)] = leaf if lasting else repr(leaf)  # JSON has no such number
    return found


def check_settings(exported: Settings, given: Mapping[str, Any]) -> None:
    """Refuse a call with other numbers, texts or flags than the exported one's.

    A list may have an entry for each image: where there are more images than were exported, its
    entries repeat.

    Raises:
        ConfigError: one differs, or the exported call had none of that name.
    """
    for name, value in settings_of(given).items():
        known = exported.get(_repeated(name, exported))
        if known != value:
            raise ConfigError(
                "a bundle computes with the numbers, texts and flags that it was exported with",
                where=f"argument {name!r}",
                got=repr(value),
                expected="none" if known is None else repr(known),
                remedy="export a bundle for this call",
            )


def _repeated(name: str, exported: Settings) -> str:
    """Return the name of the exported entry that stands for ``name``."""
    first, *rest = name.split(".")
    if name in exported or not rest or not rest[0].isdigit():
        return name
    entries = {key.split(".")[1] for key in exported if key.startswith(f"{first}.")}
    place = int(rest[0]) % max(len(entries), 1)
    return ".".join([first, str(place), *rest[1:]])
