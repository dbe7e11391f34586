"""Calibrate a plan by the paper's greedy search (DiTFastAttn, Algorithm 1), during a generation.

At each step the sites are visited in order. Candidates are tried from the cheapest on; the first
whose error at the *model's* output stays below ``(i / M) * threshold`` is taken, ``i`` counting the
sites from 1 to ``M``. Step 0 is full. The step then returns the output with all choices in force,
so that later steps are calibrated on the compressed trajectory.

What precedes a site is the same for all its candidates, so it is computed once: the search is exact
and costs about half of the forward passes that the algorithm names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ditfastattn.passes.capture import CapturedGraph
from ditfastattn.passes.ir import find
from ditfastattn.passes.plan import CfgLayout, Strategy
from ditfastattn.passes.sites import AttentionSite, attention_scale
from ditfastattn.passes.window_attention import WINDOW_ATTENTION
from ditfastattn.runtime.graph_runner import Environment, GraphRunner

CANDIDATES = (
    Strategy.SHARE_STEP,
    Strategy.WINDOW_SHARE_CFG,
    Strategy.WINDOW,
    Strategy.SHARE_CFG,
)
_ERROR_CLIP = 10.0
_EPSILON = 1e-6


@dataclass(frozen=True)
class Progress:
    """Report the search: model evaluations done, and at most how many there will be.

    ``seconds_left`` is an upper estimate from the pace so far; evaluations count whole forward
    passes, partial ones as fractions.
    """

    step: int
    steps: int
    done: float
    at_most: float
    seconds_left: float


def relative_error(reference: Tensor, candidate: Tensor) -> float:
    """Return the paper's loss: ``mean(clip(|O-O'| / (max(|O|,|O'|) + 1e-6), 0, 10))``."""
    difference = (reference - candidate).abs().float()
    scale = torch.maximum(reference.abs(), candidate.abs()).float() + _EPSILON
    return float((difference / scale).clamp(0.0, _ERROR_CLIP).mean())


@dataclass
class _SiteMemory:
    output: Tensor | None = None
    residual: Tensor | None = None


@dataclass
class GreedyCalibrator:
    """Choose strategies step by step while a generation runs.

    ``steps`` is the length of the generation where it is known (for the estimate), else 0.
    """

    captured: CapturedGraph
    sites: Sequence[AttentionSite]
    layout: CfgLayout
    threshold: float
    steps: int = 0
    on_progress: Callable[[Progress], None] | None = None
    strategies: list[tuple[Strategy, ...]] = field(default_factory=list)
    forwards: float = 0.0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        """Prepare the interpreter."""
        self._runner = GraphRunner(self.captured.module)
        graph = self.captured.module.graph
        self._attention = [find(graph, site.node) for site in self.sites]
        self._memory = [_SiteMemory() for _ in self.sites]

    def step(self, args: Sequence[Tensor]) -> tuple[Any, ...]:
        """Run the next step on flat inputs ``args``, choose its strategies, return its outputs."""
        began = time.monotonic()
        environment = self._runner.begin(args)
        first = not self.strategies
        reference = None if first else self._finish(dict(environment), 0)[0]
        row: list[Strategy] = []
        position = 0
        for index, node in enumerate(self._attention):
            self._run(environment, position, self._runner.position[node])
            position = self._runner.position[node]
            candidates = () if reference is None else self._candidates(index)
            row.append(self._choose(index, candidates, environment, reference, began))
            self._remember(index, row[-1], environment)
        outputs = self._finish(environment, position)
        self._report(began)  # at step 0 this is the estimate, before any candidate is tried
        self.strategies.append(tuple(row))
        self.seconds += time.monotonic() - began
        return outputs

    def _candidates(self, index: int) -> tuple[Strategy, ...]:
        site = self.sites[index]
        return tuple(
            strategy
            for strategy in CANDIDATES
            if strategy not in site.declined
            and not (strategy.shares_cfg and self.layout is CfgLayout.NONE)
        )

    def _choose(
        self,
        index: int,
        candidates: Sequence[Strategy],
        environment: Environment,
        reference: Tensor | None,
        began: float,
    ) -> Strategy:
        """Put the output of the chosen strategy into ``environment`` and return the strategy."""
        node = self._attention[index]
        allowed = (index + 1) / len(self.sites) * self.threshold
        position = self._runner.position[node]
        for strategy in candidates:
            attended = self._attend(index, strategy, environment)
            output = self._finish(environment | {node: attended}, position)[0]
            self._report(began)
            if reference is not None and relative_error(reference, output) < allowed:
                environment[node] = attended
                return strategy
        environment[node] = self._attend(index, Strategy.FULL, environment)
        return Strategy.FULL

    def _attend(self, index: int, strategy: Strategy, environment: Environment) -> Tensor:
        memory = self._memory[index]
        if strategy is Strategy.SHARE_STEP:
            return _required(memory.output)
        args, kwargs = self._call(index, environment)
        residual = _required(memory.residual) if strategy.windowed else None
        if strategy.shares_cfg:
            batch = args[0].shape[0]
            args = tuple(self._half(item, batch) for item in args)
            kwargs = {key: self._half(item, batch) for key, item in kwargs.items()}
            residual = self._half(residual, batch)
        if residual is not None:
            output = self._window(index, args) + residual
        else:
            output = self._attention[index].target(*args, **kwargs)  # type: ignore[operator]
        return torch.cat([output, output]) if strategy.shares_cfg else output

    def _remember(self, index: int, strategy: Strategy, environment: Environment) -> None:
        memory = self._memory[index]
        memory.output = environment[self._attention[index]]
        if strategy is Strategy.FULL and self.sites[index].window:
            args, _ = self._call(index, environment)
            memory.residual = _required(memory.output) - self._window(index, args)

    def _call(self, index: int, environment: Environment) -> tuple[tuple[Any, ...], dict[str, Any]]:
        node = self._attention[index]
        args = tuple(_resolve(item, environment) for item in node.args)
        return args, {key: _resolve(item, environment) for key, item in node.kwargs.items()}

    def _window(self, index: int, args: Sequence[Any]) -> Tensor:
        scale = attention_scale(self._attention[index])
        output: Tensor = WINDOW_ATTENTION(*args[:3], self.sites[index].window, scale)
        return output

    def _half(self, item: Any, batch: int) -> Any:
        """Return the conditional half of what has the batch."""
        if not isinstance(item, Tensor) or item.shape[0] != batch:
            return item
        middle = batch // 2
        return item[middle:] if self.layout is CfgLayout.UNCOND_FIRST else item[:middle]

    def _finish(self, environment: Environment, position: int) -> tuple[Any, ...]:
        self._run(environment, position, len(self._runner.nodes))
        return self._runner.results(environment)

    def _run(self, environment: Environment, start: int, stop: int) -> None:
        self._runner.run(environment, start, stop)
        self.forwards += (stop - start) / len(self._runner.nodes)

    def _report(self, began: float) -> None:
        if self.on_progress is None:
            return
        at_most = self.at_most()
        spent = self.seconds + time.monotonic() - began
        left = spent / self.forwards * max(0.0, at_most - self.forwards)
        step = len(self.strategies)
        self.on_progress(Progress(step, self.steps, self.forwards, at_most, left))

    def at_most(self) -> float:
        """Return how many forward passes the whole search can take, every candidate refused."""
        nodes = len(self._runner.nodes)
        suffixes = sum(
            len(self._candidates(index)) * (1.0 - self._runner.position[node] / nodes)
            for index, node in enumerate(self._attention)
        )
        steps = max(self.steps, len(self.strategies) + 1)
        return 1.0 + (steps - 1) * (2.0 + suffixes)


def _resolve(item: Any, environment: Environment) -> Any:
    return environment[item] if isinstance(item, Node) else item


def _required(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise LookupError("a cache is read before any step has written it")
    return tensor
