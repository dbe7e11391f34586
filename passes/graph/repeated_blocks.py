"""Name the repeated block (``blocks.3``) that each call belongs to, by module paths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from torch.fx import Node

from ditfastattn.passes.graph.origin import module_path


def block_names(calls: Sequence[Node]) -> list[str]:
    """Return the repeated block of each call, "" where it belongs to none.

    A call that lies between two calls of one block belongs to it.
    """
    paths = [module_path(node) for node in calls]
    repeated = _repeated_containers(set(paths))
    known = {path: _block(path, repeated) for path in set(paths)}
    names = [known[path] for path in paths]
    following = [*names, ""]
    for place in reversed(range(len(names))):
        following[place] = names[place] or following[place + 1]
    for place in range(1, len(names)):
        if names[place - 1] == following[place]:
            names[place] = following[place]
    return names


def _block(path: str, repeated: set[str]) -> str:
    """Return the outermost block of ``path`` in a container of ``repeated``, or ""."""
    found = (f"{name}.{index}" for name, index, _ in _splits(path) if name in repeated)
    return next(found, "")


def _repeated_containers(paths: set[str]) -> set[str]:
    """Return the containers of which two members have a submodule of the same path."""
    seen: dict[tuple[str, str], set[str]] = defaultdict(set)
    for path in paths:
        for container, index, rest in _splits(path):
            if rest:
                seen[container, rest].add(index)
    return {container for (container, _), indices in seen.items() if len(indices) > 1}


def _splits(path: str) -> Iterator[tuple[str, str, str]]:
    """Split ``blocks.3.ff.net.0`` at its numbers: (blocks, 3, ff.net.0), (blocks.3.ff.net, 0, )."""
    parts = path.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            yield ".".join(parts[:place]), part, ".".join(parts[place + 1 :])
