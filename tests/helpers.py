"""Build tiny diffusion transformers with random weights, and run them step by step."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor
from torch.fx import Graph, GraphModule

from ditfastattn.backend import ditfastattn as backend
from ditfastattn.passes.analysis.fingerprint import fingerprint
from ditfastattn.passes.analysis.site import Site, attentions
from ditfastattn.passes.analysis.sites import find_sites
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.capture.dynamo import capture, describe_inputs
from ditfastattn.passes.plan.calibration import Calibration
from ditfastattn.passes.plan.guidance import CfgLayout
from ditfastattn.passes.plan.legality import why_not
from ditfastattn.passes.plan.planned_site import planned_site
from ditfastattn.passes.plan.schema import Plan, Sampler
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.matching import input_shapes
from ditfastattn.runtime.reference import PlanInterpreter
from ditfastattn.tools import digits_recipe
from ditfastattn.tools.digits_pipeline import DigitsPipeline
from ditfastattn.tools.zoo import trial

STEPS = 6
TINY_DIGITS: dict[str, Any] = digits_recipe.MODEL_CONFIG | {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "sample_size": 16,
}
TIMESTEPS = tuple(float(900 - 150 * step) for step in range(STEPS))


@dataclass(frozen=True)
class TinyModel:
    """Hold a model and what it is called with at a step, for a batch of lanes."""

    model: torch.nn.Module
    call: Callable[[int, int], dict[str, Any]]  # (step, batch) -> keyword arguments

    def run(self, model: Any, batch: int = 4, steps: int = STEPS) -> list[Tensor]:
        """Call ``model`` once a step; return its outputs."""
        with torch.no_grad():
            return [model(**self.call(step, batch))[0] for step in range(steps)]

    def reference(
        self,
        strategies: Sequence[Sequence[Strategy]],
        sites: Sequence[Site],
        layout: CfgLayout,
    ) -> list[Tensor]:
        """Run the plan interpreter."""
        interpreter = PlanInterpreter(self.model, strategies, sites, layout)
        results: list[Tensor] = []
        for step in range(len(strategies)):
            with torch.no_grad(), interpreter.step(step):
                results.append(self.model(**self.call(step, 4))[0])
        return results


@functools.cache  # models are only read: tests share them
def tiny_dit(
    seed: int = 0, size: int = 8, head_dim: int = 8, heads: int = 2, layers: int = 3
) -> TinyModel:
    """Return a class-conditional DiT of three layers and 16 tokens unless told."""
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        sample_size=size,
        patch_size=2,
        num_embeds_ada_norm=10,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )

    def call(step: int, batch: int) -> dict[str, Any]:
        return {
            "hidden_states": lanes(step, batch, size),
            "timestep": timestep(step, batch),
            "class_labels": torch.arange(batch),
            "return_dict": False,
        }

    return TinyModel(randomize(model), call)


@functools.cache  # models are only read: tests share them
def tiny_pixart(seed: int = 0, size: int = 8, head_dim: int = 8, layers: int = 2) -> TinyModel:
    """Return a PixArt: two layers of self- and masked cross-attention, 16 tokens unless told."""
    torch.manual_seed(seed)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        cross_attention_dim=2 * head_dim,
        sample_size=size,
        caption_channels=12,
        norm_num_groups=1,
    )

    def call(step: int, batch: int) -> dict[str, Any]:
        mask = torch.ones(batch, 5)
        mask[::2, 3:] = 0
        return {
            "hidden_states": lanes(step, batch, size),
            "encoder_hidden_states": noise(99, batch, 5, 12),
            "timestep": timestep(step, batch),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "encoder_attention_mask": mask,
            "return_dict": False,
        }

    return TinyModel(randomize(model), call)


@functools.cache  # models are only read: tests share them
def tiny_sd3(seed: int = 0, size: int = 8, head_dim: int = 8, layers: int = 3) -> TinyModel:
    """Return an SD3: joint attention over image tokens (16, unless told) and 5 of text."""
    torch.manual_seed(seed)
    model = SD3Transformer2DModel(
        sample_size=size,
        patch_size=2,
        in_channels=4,
        num_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=2 * head_dim,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=size,
    )

    def call(step: int, batch: int) -> dict[str, Any]:
        return {
            "hidden_states": lanes(step, batch, size),
            "encoder_hidden_states": noise(99, batch, 5, 16),
            "pooled_projections": noise(98, batch, 16),
            "timestep": timestep(step, batch),
            "return_dict": False,
        }

    return TinyModel(randomize(model), call)


TINY_MODELS = {"dit": tiny_dit, "pixart": tiny_pixart, "sd3": tiny_sd3}


def noise(seed: int, *shape: int) -> Tensor:
    """Return standard normal noise that ``seed`` fixes."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lanes(step: int, batch: int, size: int = 8) -> Tensor:
    """Return latents as batched guidance has them, twice the same; an odd batch has no guidance."""
    if batch % 2:
        return noise(step, batch, 4, size, size)
    return noise(step, batch // 2, 4, size, size).repeat(2, 1, 1, 1)


def timestep(step: int, batch: int) -> Tensor:
    """Return the timestep of ``step`` for each lane."""
    return torch.full((batch,), int(TIMESTEPS[step]))


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Give zero-initialized gates and projections weights: a zero gate would hide any error."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.1)
    return model.eval()


@dataclass(frozen=True)
class Capture:
    """Hold a captured graph, its sites and the parameters and buffers it was given.

    ``sites`` are the attentions, ``every`` has the feed-forwards too. ``traced`` is the graph as
    Dynamo hands it to a backend.
    """

    graph: CapturedGraph
    every: tuple[Site, ...]
    static: list[Tensor]
    traced: GraphModule

    @property
    def sites(self) -> tuple[Site, ...]:
        return attentions(self.every)


def capture_call(model: torch.nn.Module, call: dict[str, Any]) -> Capture:
    """Return what one call of ``model`` captures."""
    found: list[Capture] = []

    def backend(module: GraphModule, _example: Sequence[Any]) -> Callable[..., Any]:
        inputs = describe_inputs(module)
        traced = _copied(module)

        def run(*args: Any) -> Any:
            graph = capture(module, inputs, args)
            pairs = zip(inputs, args, strict=True)
            static = [item for entry, item in pairs if entry.static]
            found.append(Capture(graph, find_sites(graph).sites, static, traced))
            return module(*args)

        return run

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(**call)
    return found[0]


def _copied(module: GraphModule) -> GraphModule:
    """Return ``module`` as it is now: Dynamo forgets where its inputs came from."""
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return GraphModule(module, graph)


def capture_model(model: torch.nn.Module, call: dict[str, Any]) -> CapturedGraph:
    """Return the captured graph of one call."""
    return capture_call(model, call).graph


_captures: weakref.WeakKeyDictionary[torch.nn.Module, dict[int, Capture]] = (
    weakref.WeakKeyDictionary()
)


def captured_once(tiny: TinyModel, batch: int = 4) -> Capture:
    """Return what ``tiny`` captures at ``batch``, made once per test run: nobody changes it."""
    known = _captures.setdefault(tiny.model, {})
    if batch not in known:
        known[batch] = capture_call(tiny.model, tiny.call(0, batch))
    return known[batch]


def capture_sites(tiny: TinyModel, batch: int = 4) -> tuple[CapturedGraph, tuple[Site, ...]]:
    """Return the captured graph of ``tiny`` and its attention sites."""
    found = captured_once(tiny, batch)
    return found.graph, found.sites


def capture_every_site(tiny: TinyModel) -> tuple[CapturedGraph, tuple[Site, ...]]:
    """Return the captured graph of ``tiny`` and its sites, feed-forwards among them."""
    found = captured_once(tiny)
    return found.graph, found.every


def make_plan(
    tiny: TinyModel,
    strategies: Sequence[Sequence[Strategy]],
    layout: CfgLayout = CfgLayout.COND_FIRST,
    feed_forwards: bool = False,
) -> Plan:
    """Return a plan for ``tiny`` with the strategies given."""
    found = captured_once(tiny)
    return Plan(
        model=fingerprint(found.graph, found.every, found.static),
        inputs=input_shapes(found.graph),
        sampler=Sampler(steps=len(strategies), timesteps=TIMESTEPS, cfg_layout=layout),
        sites=tuple(planned_site(site) for site in (found.every if feed_forwards else found.sites)),
        strategies=tuple(tuple(row) for row in strategies),
        calibration=Calibration(method="manual"),
    )


def compile_plan(tiny: TinyModel, plan: Plan, lowering: Lowering = Lowering.EAGER) -> Any:
    """Compile ``tiny`` by ``plan`` as users do, anew."""
    torch._dynamo.reset()
    options: dict[str, Any] = {"plan": plan, "lowering": lowering}
    return torch.compile(tiny.model, backend="ditfastattn", fullgraph=True, options=options)


def run_plan(tiny: TinyModel, plan: Plan, lowering: Lowering = Lowering.EAGER) -> list[Tensor]:
    """Compile what Dynamo makes of ``tiny``, once per test run, by ``plan``; return its outputs."""
    options = {"plan": plan, "lowering": lowering}
    run = backend(captured_once(tiny).traced, (), options=options)
    with torch.no_grad():
        return [run(*flat_inputs(tiny, step))[0] for step in range(STEPS)]


def flat_inputs(tiny: TinyModel, step: int, batch: int = 4) -> list[Tensor]:
    """Return the graph's inputs at ``step``, in its order, as the backend sees them."""
    found, call = captured_once(tiny, batch), tiny.call(step, batch)
    static = iter(found.static)
    return [next(static) if entry.static else call[entry.name] for entry in found.graph.inputs]


def tiny_digits_pipeline(scheduler: Any, size: int = 16) -> DigitsPipeline:
    """Return an untrained 16x16 pipeline of two layers, the same one each time."""
    torch.manual_seed(0)
    config: dict[str, Any] = TINY_DIGITS | {"sample_size": size}
    pipeline = DigitsPipeline(DiTTransformer2DModel(**config).eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)  # type: ignore[no-untyped-call]  # diffusers
    return pipeline


def attentive_pipeline() -> DigitsPipeline:
    """Return a tiny pipeline whose attention matters to its images."""
    made = tiny_digits_pipeline(DDIMScheduler(clip_sample=False))
    randomize(made.transformer)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.transformer.named_parameters():
            if ".attn1." in name and parameter.dim() == 2:
                parameter.normal_()
    return made


def mixed_strategies(
    sites: Sequence[Site], seed: int = 0, steps: int = STEPS
) -> list[tuple[Strategy, ...]]:
    """Return a random legal schedule in which every legal strategy of every site may occur."""
    return trial.mixed_strategies(sites, seed, steps)


def uniform_strategies(
    sites: Sequence[Site], strategy: Strategy, steps: int = STEPS
) -> list[tuple[Strategy, ...]]:
    """Return full steps as far as ``strategy`` needs them, then ``strategy`` where it is legal."""
    chosen = tuple(Strategy.FULL if why_not(strategy, s) else strategy for s in sites)
    first = max(1, strategy.outputs_read)
    return [tuple(Strategy.FULL for _ in sites)] * first + [chosen] * (steps - first)


def largest_difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Return the largest absolute difference over all steps."""
    pairs = zip(first, second, strict=True)
    return max(float((one - other).abs().max()) for one, other in pairs)
