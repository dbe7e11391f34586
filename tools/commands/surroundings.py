"""What the command line asks of the libraries around it: silence, and a cache that lasts.

Both are set in the environment before those libraries are imported, and only where the user has not
set them. Logging at debug level (``-vv``) silences nobody.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_VERBOSITY = ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY")
_TALKATIVE = ("torchao", "torch.utils._pytree")  # they warn of their own parts as they load


def silence_libraries() -> None:
    """Keep the warnings of other libraries, which a user can do nothing about, off the terminal."""
    for name in _VERBOSITY:
        os.environ.setdefault(name, "error")
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|torchao|diffusers|transformers)(\.|$)")


def keep_compiled() -> None:
    """Keep what Inductor compiles in the user's cache folder, which outlives a restart."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "ditfastattn" / "inductor"
    if _CACHE in os.environ:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # read-only: Inductor's own choice, a temporary folder, serves as well
        return
    os.environ[_CACHE] = str(folder)
