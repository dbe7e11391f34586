"""Interpret ranges of blocks eagerly: the modules are called, or hand on what they are given.

It knows nothing of graphs. Of a block it needs that each tensor it returns has the shape of just
one that it is given: the hidden stream, or both streams of joint attention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from ditfastattn.runtime.reference import PlanInterpreter

_Key = int | str  # of an argument: its place, or its name


class _Range:
    """Run the blocks of one range by the plan, and keep what they added."""

    def __init__(
        self, interpreter: PlanInterpreter, name: str, blocks: Sequence[nn.Module]
    ) -> None:
        self._interpreter = interpreter
        self._name = name
        self._last = len(blocks) - 1
        self._counted: dict[int, Counter[Any]] = {}
        self._streams: dict[int, list[_Key | None]] = {}  # what each result goes on from
        self._tuples: dict[int, bool] = {}
        self._begin: list[Tensor | None] = []
        self._added: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}

    def run(self, place: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand in for ``forward`` of the block ``place``."""
        given: dict[_Key, Any] = {}
        given.update(enumerate(args))
        given.update(kwargs.items())
        strategy = self._interpreter.strategy_of(self._name)
        if strategy.computes:
            return self._compute(place, given, partial(forward, *args, **kwargs))
        self._interpreter.calls.update(self._counted[place])
        found = [None if key is None else given[key] for key in self._streams[place]]
        if place == self._last:
            assert strategy.reference is not None
            for index, each in enumerate(found):
                if each is not None:
                    history = self._added[self._interpreter.call, index]
                    found[index] = each + strategy.reference(history, self._interpreter.now)
        return tuple(found) if self._tuples[place] else found[0]

    def _compute(self, place: int, given: Mapping[_Key, Any], compute: Callable[[], Any]) -> Any:
        before = Counter(self._interpreter.calls)
        result = compute()
        self._counted[place] = self._interpreter.calls - before
        self._tuples[place] = isinstance(result, tuple)
        results = list(result) if isinstance(result, tuple) else [result]
        self._streams[place] = [_source(each, given) for each in results]
        if place == 0:
            keys = self._streams[0]
            self._begin = [None if key is None else given[key] for key in keys]
        if place == self._last:
            for index, (base, end) in enumerate(zip(self._begin, results, strict=True)):
                if base is not None and end is not None:
                    added = self._added.setdefault((self._interpreter.call, index), [])
                    added.append((self._interpreter.now, end - base))
        return result


def _source(result: Tensor | None, given: Mapping[_Key, Any]) -> _Key | None:
    if result is None:
        return None
    keys = [
        k for k, item in given.items() if isinstance(item, Tensor) and item.shape == result.shape
    ]
    if len(keys) != 1:
        raise ValueError(f"a result of shape {list(result.shape)} may go on from {keys}")
    return keys[0]


@contextmanager
def interpreted_ranges(
    interpreter: PlanInterpreter, ranges: Mapping[str, Sequence[nn.Module]]
) -> Generator[None]:
    """Let ``interpreter`` reuse ranges, given the blocks of each by its name.

    Where one range holds another, the latter comes first.
    """
    with ExitStack() as undo:
        for name, blocks in ranges.items():
            runner = _Range(interpreter, name, blocks)
            for place, block in enumerate(blocks):
                before: Callable[..., Any] = block.forward
                undo.callback(setattr, block, "forward", before)
                block.forward = partial(runner.run, place, before)
        yield
