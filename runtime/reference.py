"""Interpret a plan eagerly, one call at a time: slow, obvious, and the oracle.

Nothing here knows of graphs or frontiers. While the mode is active every call of
``scaled_dot_product_attention``, and every call of ``linear``, is counted, and the plan's strategy
for that site decides what it returns. Sharing a step *before* the output projection gives the same
result as after it, since the projection sees nothing else; so this checks the frontier analysis
too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ditfastattn.passes.plan import CfgLayout, Strategy


class PlanInterpreter(TorchFunctionMode):
    """Run a model's attention, and its feed-forwards, by a plan.

    Use it like this::

    reference = PlanInterpreter(strategies, windows, layout)
    for step in range(steps):
        with reference.step(step):
            output = model(...)
    """

    def __init__(
        self,
        strategies: Sequence[Sequence[Strategy]],
        windows: Sequence[int],
        layout: CfgLayout,
        ordinals: Sequence[int] | None = None,
        feed_forwards: Sequence[bool] | None = None,
    ) -> None:
        """Take ``strategies[step][site]`` and the window, per side, of each site.

        ``ordinals`` places each site among all attention calls of the model, or, if it is among
        ``feed_forwards``, its last linear among all linear calls.
        """
        super().__init__()
        self._strategies = strategies
        self._windows = windows
        self._layout = layout
        places = ordinals or range(len(windows))
        kinds = feed_forwards or [False] * len(windows)
        operators = [linear if kind else scaled_dot_product_attention for kind in kinds]
        calls = zip(operators, places, strict=True)
        self._sites = {call: site for site, call in enumerate(calls)}
        self._history: dict[int, list[tuple[int, Tensor]]] = {}
        self._residuals: dict[int, Tensor] = {}
        self._step = 0
        self._calls: Counter[Any] = Counter()

    def step(self, step: int) -> PlanInterpreter:
        """Make ``step`` current; enter the result around the model's call."""
        self._step = step
        self._calls.clear()
        return self

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Intercept the sites; let everything else through."""
        keywords = dict(kwargs or {})
        site = self._sites.get((func, self._calls[func]))
        self._calls[func] += 1
        if site is None:
            return func(*args, **keywords)
        strategy = self._strategies[self._step][site]
        if not strategy.computes:
            return self._reuse(site, strategy)
        if func is linear:
            whole: Tensor = linear(*args, **keywords)
            half = self._conditional(whole, whole)
            output = torch.cat([half, half]) if strategy.shares_cfg else whole
        else:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
            keywords |= dict(zip(names, args, strict=False))
            output = self._attend(site, strategy, keywords)
        self._history.setdefault(site, []).append((self._step, output))
        return output

    def _reuse(self, site: int, strategy: Strategy) -> Tensor:
        last_step, last = self._history[site][-1]
        if strategy is Strategy.SHARE_STEP:
            return last
        step_before, before = self._history[site][-2]
        slope = (last - before) / (last_step - step_before)
        return last + slope * (self._step - last_step)

    def _attend(self, site: int, strategy: Strategy, call: dict[str, Any]) -> Tensor:
        if strategy.shares_cfg:
            half = {name: self._conditional(item, call["query"]) for name, item in call.items()}
            residual = self._conditional(self._residuals.get(site), call["query"])
            output = self._compute(site, strategy, half, residual)
            return torch.cat([output, output])
        return self._compute(site, strategy, call, self._residuals.get(site))

    def _compute(
        self, site: int, strategy: Strategy, call: dict[str, Any], residual: Tensor | None
    ) -> Tensor:
        if strategy.windowed:
            if residual is None:
                raise LookupError(f"site {site} has no residual at step {self._step}")
            return self._window(site, call) + residual
        output: Tensor = scaled_dot_product_attention(**call)
        if strategy is Strategy.FULL and self._windows[site]:
            self._residuals[site] = output - self._window(site, call)
        return output

    def _window(self, site: int, call: dict[str, Any]) -> Tensor:
        positions = torch.arange(call["query"].shape[-2], device=call["query"].device)
        band = (positions[:, None] - positions[None, :]).abs() <= self._windows[site]
        banded: dict[str, Any] = {**call, "attn_mask": band}
        windowed: Tensor = scaled_dot_product_attention(**banded)
        return windowed

    def _conditional(self, item: Any, query: Tensor) -> Any:
        """Return the conditional half of what has the batch of ``query``."""
        if not isinstance(item, Tensor) or item.shape[0] != query.shape[0]:
            return item
        half = item.shape[0] // 2
        return item[half:] if self._layout is CfgLayout.UNCOND_FIRST else item[:half]
