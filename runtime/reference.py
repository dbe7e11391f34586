"""Interpret a plan eagerly, one attention call at a time: slow, obvious, and the oracle.

Nothing here knows of graphs or frontiers. While the mode is active every call of
``scaled_dot_product_attention`` is counted, and the plan's strategy for that site decides what it
returns. Sharing a step *before* the output projection gives the same result as after it, since the
projection sees nothing else; so this checks the frontier analysis too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ditfastattn.passes.plan import CfgLayout, Strategy


class PlanInterpreter(TorchFunctionMode):
    """Run a model's attention by a plan.

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
    ) -> None:
        """Take ``strategies[step][site]`` and the window, per side, of each site.

        ``ordinals`` places each site among all attention calls of the model, where some attention
        is not a site.
        """
        super().__init__()
        self._strategies = strategies
        self._windows = windows
        self._layout = layout
        self._sites = {
            ordinal: site for site, ordinal in enumerate(ordinals or range(len(windows)))
        }
        self._outputs: dict[int, Tensor] = {}
        self._residuals: dict[int, Tensor] = {}
        self._step = 0
        self._calls = 0

    def step(self, step: int) -> PlanInterpreter:
        """Make ``step`` current; enter the result around the model's call."""
        self._step, self._calls = step, 0
        return self

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Intercept attention; let everything else through."""
        keywords = dict(kwargs or {})
        if func is not scaled_dot_product_attention:
            return func(*args, **keywords)
        site = self._sites.get(self._calls)
        self._calls += 1
        if site is None:
            return func(*args, **keywords)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
        keywords |= dict(zip(names, args, strict=False))
        self._outputs[site] = self._attend(site, self._strategies[self._step][site], keywords)
        return self._outputs[site]

    def _attend(self, site: int, strategy: Strategy, call: dict[str, Any]) -> Tensor:
        if strategy is Strategy.SHARE_STEP:
            return self._outputs[site]
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
