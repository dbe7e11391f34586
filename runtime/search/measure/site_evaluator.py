"""Run a captured step, and try any strategy at any of its sites.

All searches share this. What precedes a site is the same for all its candidates, so a caller
advances to the site once and tries each candidate on the rest of the graph alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ditfastattn.passes.analysis.attention import attention_mask, attention_scale
from ditfastattn.passes.analysis.site import Site, SiteKind
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.graph.ir import find
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.legality import legal_strategies
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.passes.windows.lower_windows import compute_window
from ditfastattn.passes.windows.masks import hides_keys_alone, windowed_mask
from ditfastattn.passes.windows.window import Window
from ditfastattn.runtime.search.measure.graph_runner import Environment, GraphRunner


def greedy_candidates(site: Site, layout: CfgLayout) -> tuple[Strategy, ...]:
    """Return the shortcuts that ``site`` may take once caches are there, the cheapest first.

    That is the order of Algorithm 1. It knows one earlier output, and so no extrapolation; and it
    does not look ahead, so that nothing would be gained for it by refreshing a residual.
    """
    legal = (s for s in legal_strategies(site, layout) if s != Strategy.FULL)
    return tuple(
        sorted(
            (
                strategy
                for strategy in legal
                if strategy.outputs_read <= 1
                and not strategy.factor_count
                and not strategy.refreshes_residual
            ),
            key=lambda strategy: strategy.effort,
        )
    )


@dataclass
class SiteMemory:
    """Hold a site's caches: of an attention ``[B, H, N, D]``, before the output projection.

    A feed-forward, whose output is ``[B, ..., C]``, has no residual.
    """

    output: Tensor | None = None
    residual: Tensor | None = None


class SiteEvaluator:
    """Interpret the graph of one step, site by site; ``forwards`` counts whole graphs run."""

    def __init__(self, captured: CapturedGraph, sites: Sequence[Site], layout: CfgLayout) -> None:
        """Prepare the interpreter."""
        self.sites = tuple(sites)
        self.layout = layout
        self.memory = [SiteMemory() for _ in sites]
        self.forwards = 0.0
        self._runner = GraphRunner(captured.module)
        self._attention = [find(captured.module.graph, site.node) for site in sites]

    def begin(self, args: Sequence[Tensor]) -> Environment:
        """Return the environment of a step with flat inputs ``args``."""
        return self._runner.begin(args)

    def finish(self, environment: Environment, after: int = -1) -> tuple[Any, ...]:
        """Run what follows site ``after`` (-1: everything) and return the step's outputs.

        The environment is used up; pass a copy to keep it.
        """
        self._run(environment, self._start(after), len(self._runner.nodes))
        return self._runner.results(environment)

    def advance(self, environment: Environment, index: int) -> None:
        """Run what lies between the site before ``index``, which is decided, and ``index``."""
        self._run(environment, self._start(index - 1), self._start(index))

    def put(self, environment: Environment, index: int, output: Tensor) -> None:
        """Make ``output`` the attention output of site ``index``."""
        environment[self._attention[index]] = output

    def trial(self, environment: Environment, index: int, output: Tensor) -> tuple[Any, ...]:
        """Return the step's outputs were ``output`` that of site ``index``, later sites full."""
        return self.finish(environment | {self._attention[index]: output}, index)

    def attend(self, environment: Environment, index: int, strategy: Strategy) -> Tensor:
        """Return the output of site ``index`` under ``strategy``, shaped as ``SiteMemory`` says."""
        memory = self.memory[index]
        if strategy.combine is not None:
            combined: Tensor = strategy.combine([_required(memory.output)], ())
            return combined
        args, kwargs = self._call(environment, index)
        if self.sites[index].kind is SiteKind.FEED_FORWARD:
            whole: Tensor = self._attention[index].target(*args, **kwargs)  # type: ignore[operator]
            half = self._half(whole, whole) if strategy.shares_guidance else None
            return whole if half is None else torch.cat([half, half])
        residual = _required(memory.residual) if strategy.windowed else None
        if strategy.shares_guidance:
            query = args[0]
            args = tuple(self._half(item, query) for item in args)
            kwargs = {key: self._half(item, query) for key, item in kwargs.items()}
            residual = self._half(residual, query)
        if residual is not None:
            output = self._window(index, args, kwargs, self.sites[index].window) + residual
        else:
            output = self._attention[index].target(*args, **kwargs)  # type: ignore[operator]
        return torch.cat([output, output]) if strategy.shares_guidance else output

    def residual(
        self, environment: Environment, index: int, output: Tensor, window: Window
    ) -> Tensor:
        """Return full minus window attention."""
        args, kwargs = self._call(environment, index)
        return output - self._window(index, args, kwargs, window)

    def remember(self, environment: Environment, index: int, strategy: Strategy) -> None:
        """Store what later steps may read of site ``index``, whose output has been put."""
        if not strategy.computes:
            return
        memory = self.memory[index]
        output: Tensor = environment[self._attention[index]]
        memory.output = output
        window = self.sites[index].window
        if strategy.refreshes_residual and window:
            residual = self.residual(environment, index, output, window)
            half = self._half(residual, residual)
            memory.residual = torch.cat([half, half]) if strategy.shares_guidance else residual

    def left_after(self, index: int) -> float:
        """Return the fraction of the graph's nodes that follow site ``index``."""
        return 1.0 - self._start(index) / len(self._runner.nodes)

    def _start(self, index: int) -> int:
        return 0 if index < 0 else self._runner.position[self._attention[index]]

    def _call(self, environment: Environment, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        node = self._attention[index]
        args = tuple(_resolve(item, environment) for item in node.args)
        return args, {key: _resolve(item, environment) for key, item in node.kwargs.items()}

    def _window(
        self, index: int, args: Sequence[Any], kwargs: Mapping[str, Any], window: Window
    ) -> Tensor:
        node = self._attention[index]
        q, k, v = args[:3]
        mask: Any = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        made = attention_mask(node)
        if made is not None:
            mask = windowed_mask(mask, k.shape[2], hides_keys_alone(made, k.shape[2]))
        return compute_window(q, k, v, window, attention_scale(node), self.sites[index].text, mask)

    def _half(self, item: Any, like: Tensor) -> Any:
        """Return the conditional half of ``item`` where it has the batch of ``like``."""
        if not isinstance(item, Tensor) or item.dim() != like.dim() or len(item) != len(like):
            return item
        middle = len(item) // 2
        return item[middle:] if self.layout is CfgLayout.UNCOND_FIRST else item[:middle]

    def _run(self, environment: Environment, start: int, stop: int) -> None:
        self._runner.run(environment, start, stop)
        self.forwards += (stop - start) / len(self._runner.nodes)


def _resolve(item: Any, environment: Environment) -> Any:
    return environment[item] if isinstance(item, Node) else item


def _required(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise LookupError("a cache is read before any step has written it")
    return tensor
