"""Models that Dynamo breaks: their calls are traced, and hold for what was read of the inputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import ditfastattn
from ditfastattn import CfgLayout, ConfigError, Plan, Strategy, load
from ditfastattn.export.bundle import export_model
from ditfastattn.export.capture_call import RecordedCall, capture_call
from ditfastattn.export.options import ExportOptions
from ditfastattn.passes.analysis.fingerprint import fingerprint
from ditfastattn.passes.analysis.site import attentions
from ditfastattn.passes.analysis.sites import find_sites
from ditfastattn.passes.plan.calibration import Calibration
from ditfastattn.passes.plan.planned_site import planned_site
from ditfastattn.passes.plan.schema import Sampler
from ditfastattn.runtime.matching import input_shapes, static_tensors
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.pipeline.prompts import generate as generate_image
from ditfastattn.runtime.settings import Settings
from ditfastattn.runtime.traced import TracedCalls
from ditfastattn.tools.zoo.base import ZooModel, noise
from ditfastattn.tools.zoo.trial import TOLERANCE, try_model
from tests.exercises import exercises
from tests.tiers import slow
from tests.tiny_pipelines import tiny_z_image_pipeline
from tests.works_with import works_with

TIMESTEPS = (900.0, 700.0, 500.0, 300.0)
WIDTH = 16


class Block(nn.Module):
    """Attention and a feed-forward, with residuals."""

    def __init__(self, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = mlp or nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        made: Tensor = x + self.mlp(self.norm2(x))
        return made


class Denoiser(nn.Module):
    """What the models below share."""

    def __init__(self, mlp: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.embed, self.text = nn.Linear(4, WIDTH), nn.Linear(6, WIDTH)
        self.blocks = nn.ModuleList(Block(mlp() if mlp else None) for _ in range(2))
        self.head = nn.Linear(WIDTH, 4)
        self.scale = 1.0

    def run(self, tokens: Tensor, timestep: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = tokens + self.scale * torch.sin(timestep / 100)[:, None, None]
        for block in self.blocks:
            tokens = block(tokens, mask)
        made: Tensor = self.head(tokens)
        return made


class Ragged(Denoiser):
    """Denoise a list of images of any sizes, each with as much text as its mask says."""

    def forward(
        self, images: list[Tensor], timestep: Tensor, words: Tensor, mask: Tensor
    ) -> tuple[list[Tensor]]:
        results = []
        for image, text, length, time in zip(
            images, words, mask.sum(1).tolist(), timestep.unbind(), strict=True
        ):
            tokens = torch.cat([self.embed(image), self.text(text[:length])])[None]
            results.append(self.run(tokens, time[None])[0, : len(image)])
        return (results,)


class Padded(Denoiser):
    """Mask the padding where there is any."""

    def forward(
        self, latent: Tensor, timestep: Tensor, words: Tensor, mask: Tensor
    ) -> tuple[Tensor]:
        tokens = torch.cat([self.embed(latent), self.text(words)], 1)
        seen = None
        if not mask.all():
            own = torch.ones(mask.shape[0], latent.shape[1], dtype=torch.bool)
            seen = torch.cat([own, mask], 1)[:, None, None]
        return (self.run(tokens, timestep, seen)[:, : latent.shape[1]],)


class Packed(Padded):
    """Leave the padding out of the tokens, by a mask as index; all images see all words."""

    def forward(
        self, latent: Tensor, timestep: Tensor, words: Tensor, mask: Tensor
    ) -> tuple[Tensor]:
        tokens = torch.cat([self.embed(latent), self._all(words, mask)], 1)
        return (self.run(tokens, timestep)[:, : latent.shape[1]],)

    def _all(self, words: Tensor, mask: Tensor) -> Tensor:
        made: Tensor = self.text(words)[mask].expand(mask.shape[0], -1, -1)
        return made


class Watching(Padded):
    """Read what is denoised."""

    def forward(
        self, latent: Tensor, timestep: Tensor, words: Tensor, mask: Tensor
    ) -> tuple[Tensor]:
        if latent.abs().max() > 1e9:
            raise ValueError
        return super().forward(latent, timestep, words, mask)


class Experts(nn.Module):
    """Send each token to one of three experts, which read how many they get."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        chosen = self.gate(flat).argmax(-1)
        order, counts = chosen.argsort(), chosen.bincount(minlength=3).tolist()
        parts = torch.split(flat[order], counts)
        made = [expert(part) for expert, part in zip(self.experts, parts, strict=True)]
        return torch.zeros_like(flat).index_copy(0, order, torch.cat(made)).view_as(x)


class Routed(Padded):
    def __init__(self) -> None:
        super().__init__(Experts)


class WeightedExperts(Experts):
    """Send each token to two of three experts, and add what they make of it by weight."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, chosen = self.gate(flat).softmax(-1).topk(2)
        order = chosen.flatten().argsort()
        ends = chosen.flatten().bincount().cumsum(0).tolist()
        total = torch.zeros_like(flat)
        for expert, start, end in zip(self.experts, [0, *ends], ends, strict=False):
            tokens = (order // 2)[start:end]
            made = expert(flat[tokens]) * weights.view(-1, 1)[order[start:end]]
            total.scatter_reduce_(0, tokens.view(-1, 1).repeat(1, WIDTH), made, reduce="sum")
        return total.view_as(x)


class Weighted(Padded):
    def __init__(self) -> None:
        super().__init__(WeightedExperts)


class Lazy(Denoiser):
    """Make a table at the first call, in a way that Dynamo does not know, and keep it."""

    table: Tensor | None = None

    def forward(
        self, latent: Tensor, timestep: Tensor, words: Tensor, mask: Tensor
    ) -> tuple[Tensor]:
        if self.table is None:
            with torch.device("cpu"):
                self.table = torch.linspace(0.0, 1.0, 16)[:, None].repeat(1, WIDTH)
        return (self.run(self.embed(latent) + self.table, timestep),)


LENGTHS = (5, 3)


def call_lists(batch: int, timestep: float, lengths: Sequence[int] = LENGTHS) -> dict[str, Any]:
    images = [noise(7, 16, 4), noise(8, 9, 4)][:batch]
    return {
        "images": images,
        "timestep": torch.full((batch,), timestep),
        "words": noise(1, 2, 6, 6)[:batch],
        "mask": (torch.arange(6) < torch.tensor(lengths)[:, None])[:batch],
    }


def call_batch(batch: int, timestep: float, lengths: Sequence[int] = LENGTHS) -> dict[str, Any]:
    given = call_lists(batch, timestep, lengths)
    del given["images"]
    return {"latent": noise(7, 1, 16, 4).repeat(batch, 1, 1)} | given


@dataclass(frozen=True)
class Handmade(ZooModel):
    made: Callable[[], nn.Module] = Ragged

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.made().eval()


def handmade(made: Callable[[], nn.Module], call: Any = call_batch) -> Handmade:
    return Handmade("Handmade", {}, call, made=made)


class Pipeline:
    """The least that is accelerated."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer


def plan_for(model: nn.Module, call: dict[str, Any], *rows: Strategy) -> Plan:
    """Return a plan of one strategy per step for all attention that a call has."""
    found = capture_call(model, RecordedCall(call))
    every = find_sites(found.graph).sites
    sites = attentions(every)
    static = static_tensors(found.graph, found.tensors)
    return Plan(
        model=fingerprint(found.graph, every, static),
        inputs=input_shapes(found.graph),
        sampler=Sampler(steps=len(rows), timesteps=TIMESTEPS, cfg_layout=CfgLayout.NONE),
        sites=tuple(planned_site(site) for site in sites),
        strategies=tuple((row,) * len(sites) for row in rows),
        calibration=Calibration(method="manual"),
    )


def generate(model: nn.Module, call: Any, lengths: Sequence[int], batch: int = 2) -> list[Tensor]:
    with torch.no_grad():
        results = [model(**call(batch, timestep, lengths))[0] for timestep in TIMESTEPS]
    return [
        item for result in results for item in (result if isinstance(result, list) else [result])
    ]


def largest_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((one - other).abs().max()) for one, other in pairs)


FULL, SHARE = Strategy.FULL, Strategy.SHARE_STEP
DENSE = (FULL, FULL, FULL, FULL)
SHARED = (FULL, SHARE, FULL, SHARE)


@pytest.mark.parametrize(
    ("made", "call"),
    [
        (Ragged, call_lists),
        slow((Padded, call_batch)),
        (Packed, call_batch),
        (Routed, call_batch),
    ],
)
def test_a_traced_models_mixed_plan_is_the_interpreters(made: Any, call: Any) -> None:
    trial = try_model(handmade(made, call))
    assert trial.error <= TOLERANCE
    assert SHARE in {strategy for row in trial.rows for strategy in row}
    assert trial.guards
    assert all("of mask (runtime/test_traced.py:" in read for read in trial.guards)


@works_with(
    "Models",
    "classes that Dynamo cannot capture (Z-Image, Lumina 2, Mochi, OmniGen)",
    "works",
    "calls are traced with their inputs, and traced again for other lengths",
)
@pytest.mark.parametrize(
    ("made", "call", "batch"),
    [(Ragged, call_lists, 2), slow((Ragged, call_lists, 1)), (Padded, call_batch, 2)],
)
def test_a_plan_that_computes_all_gives_the_dense_image(
    made: Any, call: Any, batch: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = handmade(made, call).build()
    dense = generate(model, call, LENGTHS, batch)
    plan = plan_for(model, call(batch, TIMESTEPS[0]), *DENSE)
    with caplog.at_level(logging.WARNING, "ditfastattn"):
        pipeline = ditfastattn.accelerate(Pipeline(model), plan, lowering="eager")
        assert largest_error(generate(model, call, LENGTHS, batch), dense) < 1e-5
    assert "Dynamo makes no single graph" in caplog.text
    ditfastattn.restore(pipeline)
    assert largest_error(generate(model, call, LENGTHS, batch), dense) == 0.0


def test_another_prompt_length_of_equal_sites_is_traced_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = handmade(Padded).build()
    plan = plan_for(model, call_batch(2, TIMESTEPS[0]), *SHARED)
    ditfastattn.accelerate(Pipeline(model), plan, lowering="eager")
    first = generate(model, call_batch, LENGTHS)
    with caplog.at_level(logging.WARNING, "ditfastattn"):
        whole = generate(model, call_batch, (6, 6))  # without padding: another graph
    assert "item() of mask" in caplog.text
    assert "got [True], expected [False]" in caplog.text
    shorter = generate(model, call_batch, (4, 2))  # as masked as the first one
    assert caplog.text.count("traced again") == 1
    assert largest_error(generate(model, call_batch, LENGTHS), first) == 0.0

    for found, lengths in ((whole, (6, 6)), (shorter, (4, 2))):
        twin = handmade(Padded).build()
        other = plan_for(twin, call_batch(2, TIMESTEPS[0], lengths), *SHARED)
        ditfastattn.accelerate(Pipeline(twin), other, lowering="eager")
        assert largest_error(generate(twin, call_batch, lengths), found) < 1e-6


@works_with(
    "Other calls than the plan's",
    "another prompt length, where the model leaves padding out",
    "refused",
    "the error names the input that was read, and what it held",
)
@pytest.mark.parametrize(("made", "call"), [(Ragged, call_lists), slow((Packed, call_batch))])
def test_another_prompt_length_of_other_sites_is_refused_by_name(made: Any, call: Any) -> None:
    model = handmade(made, call).build()
    plan = plan_for(model, call(2, TIMESTEPS[0]), *SHARED)
    ditfastattn.accelerate(Pipeline(model), plan, lowering="eager")
    first = generate(model, call, LENGTHS)
    with pytest.raises(ConfigError, match=r"does not match this model") as refused:
        generate(model, call, (6, 4))
    assert "of mask (runtime/test_traced.py:" in str(refused.value)
    assert "got [6, 4], expected [5, 3]" in str(refused.value) or made is Packed
    assert largest_error(generate(model, call, LENGTHS), first) == 0.0


def test_another_length_in_the_middle_of_a_generation_is_refused() -> None:
    model = handmade(Padded).build()
    plan = plan_for(model, call_batch(2, TIMESTEPS[0]), *SHARED)
    ditfastattn.accelerate(Pipeline(model), plan, lowering="eager")
    with torch.no_grad():
        model(**call_batch(2, TIMESTEPS[0]))
        with pytest.raises(ConfigError, match=r"timestep[\s\S]*item\(\) of mask"):
            model(**call_batch(2, TIMESTEPS[1], (6, 6)))


def test_a_read_of_what_is_denoised_is_refused_with_the_line() -> None:
    model = handmade(Watching).build()
    with pytest.raises(ConfigError, match=r"item\(\) \(runtime/test_traced.py:\d+ in forward\)"):
        capture_call(model, RecordedCall(call_batch(2, TIMESTEPS[0])))


def test_a_router_is_called_as_it_is_and_the_sites_around_it_are_planned() -> None:
    trial = try_model(handmade(Routed))
    assert set(trial.opaque) == {"blocks.0.mlp", "blocks.1.mlp"}
    assert all("() (runtime/test_traced.py:" in line for line in trial.opaque.values())
    assert [site.name for site in trial.report.sites] == ["blocks.0", "blocks.1"]


def test_a_bundle_runs_every_expert_on_all_tokens(tmp_path: Path) -> None:
    model = handmade(Weighted).build()
    call, options = RecordedCall(call_batch(2, TIMESTEPS[0])), ExportOptions(dynamic_batch=False)
    export_model(model, call, None, tmp_path / "bundle", options)
    bundle = load(tmp_path / "bundle")
    for timestep in TIMESTEPS:
        given = call_batch(2, timestep)
        with torch.no_grad():
            torch.testing.assert_close(bundle(**given)[0], model(**given)[0], rtol=0, atol=1e-5)


def test_no_bundle_is_made_of_a_router_that_is_not_known(tmp_path: Path) -> None:
    call = RecordedCall(call_batch(2, TIMESTEPS[0]))
    with pytest.raises(
        ConfigError, match=r"each of which gets some\s+got: +blocks\.0\.mlp: bincount\(\)"
    ):
        export_model(handmade(Routed).build(), call, None, tmp_path / "bundle")


def test_routes_follow_the_latent_and_weights_the_model() -> None:
    model = handmade(Routed).build()
    plan = plan_for(model, call_batch(2, TIMESTEPS[0]), *DENSE)
    ditfastattn.accelerate(Pipeline(model), plan, lowering="eager")
    twin = handmade(Routed).build()

    def other(batch: int, timestep: float, lengths: Sequence[int]) -> dict[str, Any]:
        return call_batch(batch, timestep, lengths) | {"latent": noise(9, batch, 16, 4) * 3}

    assert largest_error(generate(model, other, LENGTHS), generate(twin, other, LENGTHS)) < 1e-5


def test_a_setting_that_changes_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model = handmade(Padded).build()
    plan = plan_for(model, call_batch(2, TIMESTEPS[0]), *DENSE)
    ditfastattn.accelerate(Pipeline(model), plan, lowering="eager")
    generate(model, call_batch, LENGTHS)
    twin = handmade(Padded).build()
    twin.scale = model.scale = 3.0  # type: ignore[assignment]  # nn.Module takes anything
    with caplog.at_level(logging.WARNING, "ditfastattn"):
        found = generate(model, call_batch, LENGTHS)
    assert "the setting scale is 3.0, not 1.0" in caplog.text
    assert largest_error(found, generate(twin, call_batch, LENGTHS)) < 1e-5


def test_a_table_that_the_first_call_makes_is_the_models_own_at_each_capture() -> None:
    torch._dynamo.reset()
    model, call = handmade(Lazy).build(), RecordedCall(call_batch(2, TIMESTEPS[0]))
    first, second = capture_call(model, call), capture_call(model, call)
    assert first.traced is None  # Dynamo is tried again, and finds the table
    assert second.traced is None
    names = {entry.name for entry in first.graph.inputs if entry.static}
    assert names == {entry.name for entry in second.graph.inputs if entry.static}
    assert "table" in names
    prints = [
        fingerprint(one.graph, find_sites(one.graph).sites, static_tensors(one.graph, one.tensors))
        for one in (first, second)
    ]
    assert prints[0] == prints[1]


class Scaled:
    """What some attention calls: an object with a setting of its own."""

    def __init__(self, factor: float) -> None:
        self.factor = factor


def test_another_processor_is_noticed_too() -> None:
    model = Block()
    vars(model)["processor"] = Scaled(1.0)
    settings = Settings(model)
    assert settings.changed(model) == ""
    vars(model)["processor"] = Scaled(2.0)
    assert settings.changed(model) == "the setting processor.factor is 2.0, not 1.0"
    vars(model)["processor"] = Settings(model)
    assert "the setting processor" in settings.changed(model)


def test_an_argument_that_may_hold_tensors_is_refused() -> None:
    model = handmade(Padded).build()
    given = call_batch(2, TIMESTEPS[0]) | {"words": Settings(model)}
    with pytest.raises(ConfigError, match="an object of its own kind"):
        TracedCalls(model, "timestep").find(model.forward, (), given)


Z_IMAGE = {"height": 32, "width": 32, "num_inference_steps": 3, "guidance_scale": 3.0}


def prompt_of(*lengths: int) -> dict[str, Any]:
    """Return a call of Z-Image's pipeline, with embeddings of prompts of ``lengths`` tokens."""
    embeds = [noise(index, length, 12) for index, length in enumerate(lengths)]
    return Z_IMAGE | {
        "prompt_embeds": embeds,
        "negative_prompt_embeds": [noise(9, 4, 12) for _ in lengths],
    }


@exercises("image", "z_image")
@works_with(
    "Pipelines",
    "Z-Image, whose transformer takes a list of images with prompts of any lengths",
    "works",
    'with `timestep="t"`; guidance is not shared',
)
@pytest.mark.slow  # its quick twin: all and mixed plans of Ragged
def test_a_pipeline_of_lists_is_calibrated_and_accelerated() -> None:
    pipeline = tiny_z_image_pipeline()
    call = prompt_of(5)
    dense = generate_image(pipeline, Prompt(call, 5))
    plan = ditfastattn.calibrate(
        pipeline, call, target=ditfastattn.Target.threshold(0.5), timestep="t"
    )
    assert plan.changed > 0
    ditfastattn.accelerate(pipeline, plan, timestep="t", lowering="eager")
    planned = generate_image(pipeline, Prompt(call, 5))
    assert not torch.equal(planned, dense)
    assert torch.equal(generate_image(pipeline, Prompt(call, 5)), planned)
    steps = [Strategy.FULL] * len(plan.sites)
    full = plan.model_copy(update={"strategies": (tuple(steps),) * len(plan.strategies)})
    ditfastattn.accelerate(pipeline, full, timestep="t", lowering="eager")
    assert largest_error([generate_image(pipeline, Prompt(call, 5))], [dense]) < 1e-4
    ditfastattn.restore(pipeline)
    assert torch.equal(generate_image(pipeline, Prompt(call, 5)), dense)
