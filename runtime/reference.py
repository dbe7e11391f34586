"""Interpret a plan eagerly, one call at a time: slow, obvious, and the oracle.

It uses neither graphs nor exit nodes. While the mode is active, every call of
``scaled_dot_product_attention`` is counted and every call of ``linear`` known by its weight, and
the plan's strategy for that site decides what it returns. Sharing a step *before* the output
projection gives the same result as sharing it after, since the projection sees nothing else; so
this checks the analysis of exit nodes too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ditfastattn.passes.analysis.site import Site, SiteKind
from ditfastattn.passes.capture.plain_tensors import is_plain
from ditfastattn.passes.graph.origin import readable_path
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.passes.windows.window import TileWindow

_ATTENTION = scaled_dot_product_attention


@dataclass
class _Branch:
    """Hold what earlier calls of a guidance branch have left: outputs by step, and residuals."""

    history: dict[int, list[tuple[int, Tensor]]] = field(default_factory=dict)
    residuals: dict[int, Tensor] = field(default_factory=dict)


class PlanInterpreter(TorchFunctionMode):
    """Run a model's attention, and its feed-forwards, by a plan.

    For example::

        reference = PlanInterpreter(model, strategies, sites, layout)
        for step in range(steps):
            with reference.step(step):
                output = model(...)

    """

    def __init__(
        self,
        model: nn.Module,
        strategies: Sequence[Sequence[Strategy]],
        sites: Sequence[Site],
        layout: CfgLayout,
    ) -> None:
        """Take ``strategies[step][site]``, and the model that will be called.

        Of ``sites`` it needs their windows and their positions: an attention's among all attention
        calls of the model, that of a feed-forward's last linear among the calls with its weight.
        Ranges of blocks are run by ``interpreted_ranges``, and the whole output by the caller.

        Raises:
            ValueError: a site is not such a call, as where attention is written as products.

        """
        super().__init__()
        unseen = [s.name for s in sites if s.ordinal < 0 and not s.kind.holds_others]
        if unseen:
            raise ValueError(
                f"the interpreter sees only calls of scaled_dot_product_attention; these sites are "
                f"written otherwise: {', '.join(unseen)}; interpret a twin that calls it"
            )
        self._strategies = strategies
        self._described = sites
        self._layout = layout
        self._model = model  # so that no address is used again
        self._weights: dict[int, str] = {}  # names by identity; the first one of a shared weight
        names: dict[str, str] = {}
        for path, parameter in model.named_parameters(remove_duplicate=False):
            if is_plain(parameter):  # what is computed from others is counted
                names[readable_path(path)] = self._weights.setdefault(id(parameter), path)
        self._sites: dict[tuple[Any, int], list[int]] = {}  # several where heads are split
        for index, site in enumerate(sites):
            if site.kind.holds_others:
                continue
            of_feed_forward = site.kind is SiteKind.FEED_FORWARD
            func = (linear, names.get(site.weight, "")) if of_feed_forward else _ATTENTION
            self._sites.setdefault((func, site.ordinal), []).append(index)
        self._branches = [_Branch(), _Branch()]
        self._branch = self._branches[0]
        self._hidden = self.now = self.call = 0
        self.calls: Counter[Any] = Counter()  # of this call of the model, by function and weight

    def step(self, step: int, call: int = 0) -> PlanInterpreter:
        """Make ``step`` current; use the result as a context around the model's call.

        ``call`` is 1 for the second call of a step, where guidance takes two.
        """
        self.now, self.call = step, call
        self._branch = self._branches[call]
        self.calls.clear()
        return self

    def strategy_of(self, name: str) -> Strategy:
        """Return what the site ``name`` does at the current step."""
        names = [site.name for site in self._described]
        return self._strategies[self.now][names.index(name)]

    @contextmanager
    def outside(self, modules: Iterable[nn.Module]) -> Generator[None]:
        """Leave out of the counts what ``modules`` call: they stay whole in the graph."""

        def enter(*_: Any) -> None:
            self._hidden += 1

        def leave(*_: Any) -> None:
            self._hidden -= 1

        with ExitStack() as undo:
            for module in modules:
                undo.callback(module.register_forward_pre_hook(enter).remove)
                undo.callback(module.register_forward_hook(leave, always_call=True).remove)
            yield

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Intercept the sites; let everything else through."""
        keywords = dict(kwargs or {})
        if self._hidden:
            return func(*args, **keywords)
        if func is functional.multi_head_attention_forward:
            # If it dispatched by itself, the calls that it makes would not be seen.
            with self, patch.object(functional, "has_torch_function", lambda _: False):
                return func(*args, **keywords)
        called = (linear, self._weight(*args, **keywords)) if func is linear else func
        sites = self._sites.get((called, self.calls[called]), [])
        self.calls[called] += 1
        if not sites:
            return func(*args, **keywords)
        if func is linear:
            return self._run(
                sites[0], lambda strategy: self._feed_forward(strategy, args, keywords)
            )
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
        keywords |= dict(zip(names, args, strict=False))
        if self._described[sites[0]].whole is None:
            return self._run(sites[0], partial(self._attend, sites[0], keywords))
        calls = [self._of_heads(site, keywords) for site in sites]
        outputs = [
            self._run(site, partial(self._attend, site, call))
            for site, call in zip(sites, calls, strict=True)
        ]
        return torch.cat(outputs, dim=-3)

    def _weight(self, _: Tensor, weight: Tensor, *__: Any, **___: Any) -> str:
        """Return the name of a linear's weight, "" where that is not one of the model's own."""
        return self._weights.get(id(weight), "")

    def _run(self, site: int, compute: Callable[[Strategy], Tensor]) -> Tensor:
        """Return the output of ``site``, reused or from ``compute``, and record it."""
        strategy = self._strategies[self.now][site]
        if not strategy.computes:
            return self._reuse(site, strategy)
        if strategy.shares_guidance and self._branch is self._branches[1]:
            copied = self._branches[0].history[site][-1]
            self._branch.history.setdefault(site, []).append(copied)
            if strategy.refreshes_residual:
                self._branch.residuals[site] = self._branches[0].residuals[site]
            return copied[1]
        output = compute(strategy)
        self._branch.history.setdefault(site, []).append((self.now, output))
        return output

    def _feed_forward(
        self, strategy: Strategy, args: Sequence[Any], keywords: Mapping[str, Any]
    ) -> Tensor:
        whole: Tensor = linear(*args, **keywords)
        half = self._conditional(whole, whole)
        return torch.cat([half, half]) if self._halves(strategy) else whole

    def _of_heads(self, site: int, call: Mapping[str, Any]) -> dict[str, Any]:
        """Return the call of an attention for the heads of ``site`` alone."""
        here = self._described[site]
        heads = call["query"].shape[-3]
        narrowed = dict(call)
        if narrowed.pop("enable_gqa", False):
            for name in ("key", "value"):
                repeats = heads // call[name].shape[-3]
                narrowed[name] = call[name].repeat_interleave(repeats, dim=-3)
        for name in ("query", "key", "value", "attn_mask"):
            item = narrowed.get(name)
            if item is not None and item.dim() > 2 and item.shape[-3] == heads:
                narrowed[name] = item.narrow(-3, here.first_head, here.heads)
        return narrowed

    def _reuse(self, site: int, strategy: Strategy) -> Tensor:
        assert strategy.reference is not None
        reused: Tensor = strategy.reference(self._branch.history[site], self.now)
        return reused

    def _attend(self, site: int, call: dict[str, Any], strategy: Strategy) -> Tensor:
        if self._halves(strategy):
            half = {name: self._conditional(item, call["query"]) for name, item in call.items()}
            residual = self._conditional(self._branch.residuals.get(site), call["query"])
            output = self._compute(site, strategy, half, residual)
            if strategy.refreshes_residual:  # of that half, for both
                self._branch.residuals[site] = torch.cat([self._branch.residuals[site]] * 2)
            return torch.cat([output, output])
        return self._compute(site, strategy, call, self._branch.residuals.get(site))

    def _compute(
        self, site: int, strategy: Strategy, call: dict[str, Any], residual: Tensor | None
    ) -> Tensor:
        if strategy.windowed:
            if residual is None:
                raise LookupError(f"site {site} has no residual at step {self.now}")
            return _window(self._described[site], call) + residual
        output: Tensor = scaled_dot_product_attention(**call)
        if strategy.refreshes_residual and self._described[site].window:
            self._branch.residuals[site] = output - _window(self._described[site], call)
        return output

    def _halves(self, strategy: Strategy) -> bool:
        """Return whether half of this call's batch serves both."""
        return strategy.shares_guidance and self._layout.batched

    def _conditional(self, item: Any, query: Tensor) -> Any:
        """Return the conditional half of what has the batch of ``query``."""
        if not isinstance(item, Tensor) or item.dim() != query.dim():
            return item
        if item.shape[0] != query.shape[0]:
            return item
        half = item.shape[0] // 2
        return item[half:] if self._layout is CfgLayout.UNCOND_FIRST else item[:half]


def _window(site: Site, call: Mapping[str, Any]) -> Tensor:
    """Return the attention ``call`` within the window of ``site``, by a mask."""
    queries, keys = call["query"].shape[-2], call["key"].shape[-2]
    position = torch.arange(keys, device=call["query"].device)
    text = (position < site.text[0]) | (position >= keys - site.text[1])
    if isinstance(site.window, TileWindow):
        near = _near_tiles(site.window, position - site.text[0])
    else:
        near = (position[:, None] - position[None, :]).abs() <= site.window
    seen = near | text[:, None] | text[None, :]
    if queries < keys:  # the image's alone
        seen = seen[~text]
    mask = call.get("attn_mask")
    if mask is not None:
        seen = seen & mask if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)
    masked: dict[str, Any] = {**call, "attn_mask": seen}
    windowed: Tensor = scaled_dot_product_attention(**masked)
    return windowed


def _near_tiles(window: TileWindow, position: Tensor) -> Tensor:
    """Return which pairs of tokens are in tiles near each other, ``[N, N]``, axis by axis."""
    near = torch.ones(len(position), len(position), dtype=torch.bool, device=position.device)
    for axis, count in enumerate(window.counts):
        behind = math.prod(window.grid[axis + 1 :])
        tile = position // behind % window.grid[axis] // window.tile[axis]
        first = (tile - window.reach[axis]).clamp(0, count - window.spans[axis])
        last = first + window.spans[axis] - 1
        near &= (first[:, None] <= tile[None, :]) & (tile[None, :] <= last[:, None])
    return near
