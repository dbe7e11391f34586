"""A bundle run by ONNX Runtime computes what the plan interpreter does, at any batch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from onnx.reference import ReferenceEvaluator

from ditfastattn import CfgLayout, ConfigError, Strategy, export, load, verify
from ditfastattn.export import graph_files, step_graphs
from ditfastattn.export.bundle import export_model
from ditfastattn.export.capture_call import RecordedCall
from ditfastattn.export.options import ExportOptions
from ditfastattn.export.partial import partial_folder
from ditfastattn.passes.plan.planned_site import planned_site
from ditfastattn.passes.plan.strategies import strategies
from ditfastattn.passes.windows.window import TileWindow
from ditfastattn.runtime.bundle import load as loading
from ditfastattn.runtime.bundle.graph_file import GraphFile
from ditfastattn.runtime.bundle.manifest import MANIFEST, read_manifest
from tests.export.helpers import export_anew, export_once, export_tiny
from tests.helpers import (
    TIMESTEPS,
    TINY_MODELS,
    TinyModel,
    capture_every_site,
    largest_difference,
    make_plan,
    mixed_strategies,
    tiny_digits_pipeline,
    tiny_dit,
    uniform_strategies,
)
from tests.plans import plan_for
from tests.tiers import slow_but

LAYOUTS = [CfgLayout.COND_FIRST, CfgLayout.UNCOND_FIRST]


@pytest.mark.parametrize(
    ("name", "layout"),
    slow_but(
        {("pixart", LAYOUTS[0]), ("dit", LAYOUTS[1])},
        product(TINY_MODELS, LAYOUTS),
    ),
)
def test_a_mixed_plan_equals_the_plan_interpreter(
    name: str, layout: CfgLayout, tmp_path: Path
) -> None:
    tiny = TINY_MODELS[name]()
    _, sites = capture_every_site(tiny)
    rows = mixed_strategies(sites, seed=5)
    export_tiny(tiny, rows, tmp_path / "bundle", layout)
    bundle = load(tmp_path / "bundle")
    expected = tiny.reference(rows, sites, layout)
    assert largest_difference(tiny.run(bundle), expected) < 1e-4
    assert largest_difference(tiny.run(bundle), expected) < 1e-4  # the next generation


@pytest.mark.parametrize("strategy", strategies(), ids=str)
def test_each_strategy_equals_the_plan_interpreter(strategy: Strategy, tmp_path: Path) -> None:
    tiny = tiny_dit()
    _, sites = capture_every_site(tiny)
    rows = uniform_strategies(sites, strategy)
    manifest = export_tiny(tiny, rows, tmp_path / "bundle")
    assert len(manifest.variants) <= 3
    expected = tiny.reference(rows, sites, CfgLayout.COND_FIRST)
    assert largest_difference(tiny.run(load(tmp_path / "bundle")), expected) < 1e-4


def test_a_dense_bundle_is_the_model_at_any_step(tmp_path: Path) -> None:
    tiny = tiny_dit()
    manifest = export_tiny(tiny, None, tmp_path / "bundle")
    assert len(manifest.variants) == 1
    bundle = load(tmp_path / "bundle")
    for batch in (1, 2, 5):
        assert largest_difference(tiny.run(bundle, batch), tiny.run(tiny.model, batch)) < 1e-4


def test_the_batch_is_free(tmp_path: Path) -> None:
    tiny = tiny_dit()
    _, sites = capture_every_site(tiny)
    rows = uniform_strategies(sites, Strategy.WINDOW_SHARE_CFG)
    manifest = export_tiny(tiny, rows, tmp_path / "bundle")
    assert manifest.fixed_batch == 0
    assert manifest.batch_multiple == 2
    graph = onnx.load(tmp_path / "bundle" / "variant_01.onnx", load_external_data=False).graph
    named = {
        item.name: item.type.tensor_type.shape.dim[0].dim_param
        for item in (*graph.input, *graph.output)
        if item.type.tensor_type.shape.dim
    }
    assert named["hidden_states"] == "batch"
    assert set(named.values()) <= {"batch", "batch/2"}
    bundle = load(tmp_path / "bundle")
    four = tiny.run(bundle, 4)

    def eight(step: int, batch: int) -> dict[str, Any]:
        call = tiny.call(step, 4)
        halves = {k: v.chunk(2) for k, v in call.items() if isinstance(v, torch.Tensor)}
        return {**call, **{k: torch.cat([a, a, b, b]) for k, (a, b) in halves.items()}}

    twice = TinyModel(tiny.model, eight).run(bundle, 8)
    wanted = [torch.cat([a, a, b, b]) for a, b in (out.chunk(2) for out in four)]
    assert largest_difference(twice, wanted) < 1e-5
    with pytest.raises(ConfigError, match="a multiple of 2"):
        tiny.run(bundle, 3)


def test_a_fixed_batch_refuses_others(tmp_path: Path) -> None:
    tiny = tiny_dit()
    export_tiny(tiny, None, tmp_path / "bundle", options=ExportOptions(dynamic_batch=False))
    bundle = load(tmp_path / "bundle")
    assert largest_difference(tiny.run(bundle, 4), tiny.run(tiny.model, 4)) < 1e-4
    with pytest.raises(ConfigError, match="another batch"):
        tiny.run(bundle, 2)


class Evaluated:
    """Run a graph by ONNX's own evaluator, in a session's place."""

    device = torch.device("cpu")
    providers = ("ReferenceEvaluator",)

    def __init__(self, graph: GraphFile, inputs: Any, outputs: Any, _options: Any) -> None:
        self.evaluator = ReferenceEvaluator(str(graph.path))
        self.inputs, self.outputs = inputs, list(outputs)

    def __call__(self, tensors: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> None:
        given = {name: t.numpy() for name, t in zip(self.inputs, tensors, strict=True)}
        found = self.evaluator.run(self.outputs, given)
        for result, item in zip(results, found, strict=True):
            result.copy_(torch.from_numpy(item))


@pytest.mark.parametrize("name", slow_but({"dit"}, TINY_MODELS))
def test_onnx_own_evaluator_agrees(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = TINY_MODELS[name]()
    _, sites = capture_every_site(tiny)
    drawn = (mixed_strategies(sites, seed) for seed in range(50))
    rows = next(rows for rows in drawn if {s for row in rows for s in row} == {*strategies()})
    export_tiny(tiny, rows, tmp_path / "bundle")
    monkeypatch.setattr(loading, "OnnxGraph", Evaluated)
    bundle = load(tmp_path / "bundle")
    assert bundle.providers == ("ReferenceEvaluator",)
    expected = tiny.reference(rows, sites, CfgLayout.COND_FIRST)
    assert largest_difference(tiny.run(bundle), expected) < 1e-4


@pytest.mark.parametrize("name", slow_but({"dit"}, ["dit", "sd3"]))
def test_windows_by_tiles_equal_the_plan_interpreter(name: str, tmp_path: Path) -> None:
    tiny = TINY_MODELS[name]()
    _, sites = capture_every_site(tiny)
    tiled = [
        replace(site, window=next(w for w in site.windows if isinstance(w, TileWindow)))
        if site.windows
        else site
        for site in sites
    ]
    assert any(isinstance(site.window, TileWindow) for site in tiled)
    rows = mixed_strategies(tiled, seed=5)
    plan = make_plan(tiny, rows, CfgLayout.COND_FIRST, feed_forwards=True)
    plan = plan.model_copy(update={"sites": tuple(planned_site(site) for site in tiled)})
    export_once(tiny, plan, tmp_path / "bundle")
    expected = tiny.reference(rows, tiled, CfgLayout.COND_FIRST)
    assert largest_difference(tiny.run(load(tmp_path / "bundle")), expected) < 1e-4


def test_caches_are_written_into_what_dropped_caches_leave(tmp_path: Path) -> None:
    """Two tensors take turns at a slot, and a second generation allocates none."""
    tiny = tiny_dit()
    _, sites = capture_every_site(tiny)
    rows = uniform_strategies(sites, Strategy.SHARE_CFG)
    full, share = rows[0], uniform_strategies(sites, Strategy.SHARE_STEP)[1]
    rows = [full, share, full, share, full, share]
    export_tiny(tiny, rows, tmp_path / "bundle")
    bundle = load(tmp_path / "bundle")
    expected = tiny.reference(rows, sites, CfgLayout.COND_FIRST)
    assert largest_difference(tiny.run(bundle), expected) < 1e-4
    buffers, slots = bundle._states.current().buffers, len(bundle.manifest.slots)
    assert slots <= buffers.count <= 2 * slots
    made = buffers.count
    assert largest_difference(tiny.run(bundle), expected) < 1e-4
    assert buffers.count == made
    tiny.run(bundle, 8)
    assert buffers.count == made  # of the other batch; those of this one are gone


def test_fp16_is_half_the_size_and_close(tmp_path: Path) -> None:
    tiny = tiny_dit()
    export_tiny(tiny, None, tmp_path / "full")
    manifest = export_tiny(tiny, None, tmp_path / "half", options=ExportOptions(dtype="float16"))
    sizes = [(tmp_path / name / "weights.bin").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    assert manifest.model.dtype == "float16"
    bundle = load(tmp_path / "half")
    assert bundle.dtype == torch.float16
    call = tiny.call(0, 2)
    got = bundle(**{**call, "hidden_states": call["hidden_states"].half()})[0]
    with torch.no_grad():
        expected = tiny.model(**call)[0]
    assert got.dtype == torch.float16
    assert float((got - expected).abs().max()) < 5e-2


@pytest.mark.parametrize("name", slow_but({"dit"}, TINY_MODELS))
def test_bf16_is_valid_onnx(name: str, tmp_path: Path) -> None:
    tiny = TINY_MODELS[name]()
    _, sites = capture_every_site(tiny)
    options = ExportOptions(dtype="bfloat16")  # the export lints; no provider here runs it
    rows = mixed_strategies(sites, seed=2)
    manifest = export_tiny(tiny, rows, tmp_path / "bundle", options=options)
    assert {spec.dtype for spec in manifest.outputs} == {"bfloat16"}


@pytest.mark.slow
def test_a_planned_half_bundle_is_verified_against_the_whole_model(tmp_path: Path) -> None:
    pipeline = tiny_digits_pipeline(DPMSolverMultistepScheduler())
    call = {"class_labels": [1, 4], "num_inference_steps": 4, "guidance_scale": 2.0}
    steps = [Strategy.FULL, Strategy.WINDOW, Strategy.SHARE_STEP, Strategy.SHARE_CFG]
    plan = plan_for(pipeline, call, steps)
    export(pipeline, call, plan, tmp_path / "bundle", dtype="float16", loop=True)
    found = verify(tmp_path / "bundle", pipeline, call)
    assert found.passed
    assert 1e-5 < max(found.step_errors) < 5e-2 == found.bounds[0]  # fp16 is not fp32
    assert found.loop_error > 0.0


def test_variants_share_one_file_of_weights_each_content_once(tmp_path: Path) -> None:
    tiny = tiny_dit()
    _, sites = capture_every_site(tiny)
    export_tiny(tiny, None, tmp_path / "dense")
    manifest = export_tiny(tiny, mixed_strategies(sites, seed=5), tmp_path / "planned")
    assert len(manifest.variants) > 3
    sizes = [(tmp_path / n / "weights.bin").stat().st_size for n in ("dense", "planned")]
    assert sizes[1] <= 1.05 * sizes[0]


def test_nothing_is_computed_twice(tmp_path: Path) -> None:
    """Each block of a DiT embeds the timestep anew, up to its own weights."""
    export_tiny(tiny_dit(), None, tmp_path)
    (variant,) = read_manifest(tmp_path).variants
    nodes = list(onnx.load(tmp_path / variant.file).graph.node)
    assert sum(node.op_type == "Sin" for node in nodes) == 1
    for node in nodes:
        del node.output[:]
        node.name = ""
    computed = [node.SerializeToString() for node in nodes if node.op_type != "Identity"]
    assert len(set(computed)) == len(computed)


def test_shared_steps_hold_no_attention(tmp_path: Path) -> None:
    tiny = tiny_dit()
    _, sites = capture_every_site(tiny)
    rows = uniform_strategies(sites, Strategy.SHARE_STEP)
    manifest = export_tiny(tiny, rows, tmp_path / "bundle")
    kinds = [
        {node.op_type for node in onnx.load(tmp_path / "bundle" / v.file).graph.node}
        for v in manifest.variants
    ]
    assert "Softmax" in kinds[manifest.schedule[0]]
    assert not {"Softmax", "Gelu"} & kinds[manifest.schedule[1]]


def test_the_texts_keys_are_computed_once_per_generation(tmp_path: Path) -> None:
    tiny = TINY_MODELS["pixart"]()
    _, sites = capture_every_site(tiny)
    manifest = export_tiny(tiny, mixed_strategies(sites, seed=1), tmp_path / "bundle")
    assert manifest.hoisted is not None
    assert manifest.hoisted.inputs == ("encoder_hidden_states",)
    assert all("encoder_hidden_states" not in variant.inputs for variant in manifest.variants)


def test_a_pipeline_runs_the_bundle_and_verify_says_so(tmp_path: Path) -> None:
    pipeline = tiny_digits_pipeline(DPMSolverMultistepScheduler())
    call = {"class_labels": [1, 4], "num_inference_steps": 4, "guidance_scale": 2.0}
    steps = [Strategy.FULL, Strategy.WINDOW, Strategy.SHARE_STEP, Strategy.SHARE_CFG]
    plan = plan_for(pipeline, call, steps)
    told: list[tuple[str, int, int]] = []
    export(pipeline, call, plan, tmp_path / "bundle", on_progress=lambda *done: told.append(done))
    files = [*(f"variant_{index:02d}.onnx" for index in range(4)), "golden.safetensors"]
    assert told == [(file, index + 1, 5) for index, file in enumerate(files)]
    found = verify(tmp_path / "bundle", pipeline, call)
    assert found.passed
    assert len(found.step_errors) == 4
    assert set(found.variant_errors) == {f"variant_{index:02d}.onnx" for index in range(4)}
    assert found.psnr > 50
    pipeline.transformer = load(tmp_path / "bundle")  # type: ignore[assignment]  # it stands in
    generator = torch.Generator().manual_seed(0)
    images: Any = pipeline(**call, generator=generator, output_type="pt")  # type: ignore[arg-type]
    assert images.images.shape == (2, 1, 16, 16)


def test_verify_notices_other_weights(tmp_path: Path) -> None:
    pipeline = tiny_digits_pipeline(DDIMScheduler(clip_sample=False))
    call = {"class_labels": [1], "num_inference_steps": 2}
    export(pipeline, call, None, tmp_path / "bundle")
    with torch.no_grad():
        pipeline.transformer.proj_out_2.bias.add_(1.0)
    assert not verify(tmp_path / "bundle", pipeline, call).passed


def test_the_forward_is_the_models(tmp_path: Path) -> None:
    tiny = tiny_dit()
    export_tiny(tiny, None, tmp_path / "bundle")
    bundle = load(tmp_path / "bundle")
    call = tiny.call(0, 2)
    latent = call.pop("hidden_states")
    assert bundle(latent, **{**call, "return_dict": True}).sample.shape == latent.shape
    assert bundle.providers == ("CPUExecutionProvider",)
    assert bundle.config.sample_size == bundle.config["sample_size"] == 8
    with pytest.raises(ConfigError, match="unknown or repeated"):
        bundle(latent, nonsense=1)
    with pytest.raises(ConfigError, match="missing"):
        bundle(latent)


def test_a_step_out_of_the_schedule_is_refused(tmp_path: Path) -> None:
    tiny = tiny_dit()
    _, sites = capture_every_site(tiny)
    export_tiny(tiny, uniform_strategies(sites, Strategy.SHARE_STEP), tmp_path / "bundle")
    bundle = load(tmp_path / "bundle")
    bundle(**tiny.call(0, 4))
    wrong = {**tiny.call(1, 4), "timestep": torch.full((4,), int(TIMESTEPS[3]))}
    with pytest.raises(ConfigError, match="unexpected timestep"):
        bundle(**wrong)


def test_an_export_replaces_a_bundle_and_nothing_else(tmp_path: Path) -> None:
    tiny = tiny_dit()
    occupied = tmp_path / "folder"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not a bundle"):
        export_anew(tiny, None, occupied)
    assert (occupied / "thesis.txt").read_text() == "mine"
    export_anew(tiny, None, tmp_path / "bundle")
    first = read_manifest(tmp_path / "bundle")
    export_anew(tiny, None, tmp_path / "bundle", options=ExportOptions(dynamic_batch=False))
    assert read_manifest(tmp_path / "bundle").fixed_batch == 4 != first.fixed_batch
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "folder"]


def test_a_failing_export_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_dit()
    export_tiny(tiny, None, tmp_path / "bundle")
    before = (tmp_path / "bundle" / MANIFEST).read_text()
    refused = ConfigError("no")

    def refuse(path: Path) -> None:
        raise refused

    monkeypatch.setattr(graph_files, "lint", refuse)
    with pytest.raises(ConfigError, match="no"):
        export_anew(tiny, None, tmp_path / "bundle")
    assert (tmp_path / "bundle" / MANIFEST).read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_killed_export_goes_on_with_the_next_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_dit()
    _, sites = capture_every_site(tiny)
    rows = mixed_strategies(sites, seed=5)
    whole = export_tiny(tiny, rows, tmp_path / "whole")
    written: list[str] = []
    write = step_graphs.write_graph

    def noting(graph: Any, weights: Any, name: str, about: Any) -> Any:
        if len(written) == 2 and name == "variant_02":
            raise KeyboardInterrupt
        written.append(name)
        return write(graph, weights, name, about)

    monkeypatch.setattr(graph_files, "write_graph", noting)
    with pytest.raises(KeyboardInterrupt):
        export_anew(tiny, rows, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    written.append("killed")
    with (tmp_path / ".bundle.partial" / "weights.bin").open("ab") as file:
        file.write(b"half a tensor")
    manifest = export_anew(tiny, rows, tmp_path / "bundle")
    assert written[:4] == ["variant_00", "variant_01", "killed", "variant_02"]
    assert manifest.files == whole.files
    expected = tiny.reference(rows, sites, CfgLayout.COND_FIRST)
    assert largest_difference(tiny.run(load(tmp_path / "bundle")), expected) < 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "whole"]


def test_what_another_export_left_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe = step_graphs.describe

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(graph_files, "describe", fail)
    with pytest.raises(OSError, match="no space"):
        export_anew(tiny_dit(1), None, tmp_path / "bundle")
    assert (tmp_path / ".bundle.partial").exists()
    monkeypatch.setattr(graph_files, "describe", describe)
    tiny = tiny_dit()
    export_anew(tiny, None, tmp_path / "bundle")
    bundle = load(tmp_path / "bundle")
    assert largest_difference(tiny.run(bundle), tiny.run(tiny.model)) < 1e-4


def test_a_bundle_is_back_after_an_export_was_killed_between_renames(tmp_path: Path) -> None:
    tiny = tiny_dit()
    export_tiny(tiny, None, tmp_path / "bundle")
    before = (tmp_path / "bundle" / MANIFEST).read_text()
    (tmp_path / "bundle").rename(tmp_path / ".bundle.old")
    with suppress(ConfigError), partial_folder(tmp_path / "bundle"):
        raise ConfigError("refused")
    assert (tmp_path / "bundle" / MANIFEST).read_text() == before


def test_a_machine_out_of_memory_loses_no_finished_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def fail(*_: Any) -> None:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(graph_files, "describe", fail)
    with pytest.raises(RuntimeError, match="memory"):
        export_anew(tiny_dit(), None, tmp_path / "bundle")
    assert (tmp_path / ".bundle.partial" / "variant_00.onnx").is_file()


def test_two_exports_do_not_write_one_bundle(tmp_path: Path) -> None:
    with partial_folder(tmp_path / "bundle"), pytest.raises(ConfigError, match="another export"):
        export_anew(tiny_dit(), None, tmp_path / "bundle")


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    other, tiny = tiny_dit(1), tiny_dit()
    _, sites = capture_every_site(other)
    rows = uniform_strategies(sites, Strategy.SHARE_STEP)
    plan = make_plan(other, rows, feed_forwards=True)
    with pytest.raises(ConfigError, match=r"plan\.model\.weights"):
        export_model(tiny.model, RecordedCall(tiny.call(0, 4)), plan, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_the_manifest_tells_the_caches(tmp_path: Path) -> None:
    tiny = tiny_dit()
    _, sites = capture_every_site(tiny)
    export_tiny(tiny, uniform_strategies(sites, Strategy.EXTRAPOLATE), tmp_path / "bundle")
    data = json.loads((tmp_path / "bundle" / MANIFEST).read_text())
    names = {slot["name"]: slot for slot in data["slots"]}
    site = sites[0].name
    assert names[f"{site}/output.0@1"]["source"] == f"{site}/output.0"
    assert names[f"{site}/output.0"]["shape"][0] == {"numerator": 1, "denominator": 1}
    assert data["factors"][2][f"{site}/factor.0"] == 1.0


def test_the_manifest_tells_the_caches_of_parabolas(tmp_path: Path) -> None:
    tiny = tiny_dit()
    _, sites = capture_every_site(tiny)
    full, share, curve = Strategy.FULL, Strategy.SHARE_STEP, Strategy.EXTRAPOLATE_QUADRATIC
    rows = [(entry,) * len(sites) for entry in (full, full, share, full, curve, curve)]
    manifest = export_tiny(tiny, rows, tmp_path / "bundle")
    named, site = {slot.name: slot for slot in manifest.slots}, sites[0].name
    output, previous, earlier = (
        named[f"{site}/{slot}"] for slot in ("output.0", "output.0@1", "output.0@2")
    )
    assert (output.source, previous.source, earlier.source) == ("", output.name, previous.name)
    assert output.lives == ((0, 1), (1, 3), (3, 5))
    assert previous.lives == ((1, 3), (3, 5))
    assert earlier.lives == ((3, 5),)
    assert earlier.shape == output.shape
    # Outputs at steps 3, 1 and 0: Newton's differences, two steps apart and one.
    for step, elapsed in ((4, 1), (5, 2)):
        bend = elapsed * (elapsed + 2) / 3
        numbers = manifest.factors[step]
        assert numbers[f"{site}/factor.0"] == pytest.approx((elapsed + bend) / 2)
        assert numbers[f"{site}/factor.1"] == pytest.approx(-bend)
    assert manifest.schedule[4] == manifest.schedule[5]
    expected = tiny.reference(rows, sites, CfgLayout.COND_FIRST)
    assert largest_difference(tiny.run(load(tmp_path / "bundle")), expected) < 1e-4
