"""A bundle of AOTInductor packages computes what the plan interpreter does, with shared weights."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors import safe_open
from torch import Tensor, nn

import ditfastattn
from ditfastattn import CfgLayout, ConfigError, EngineError, Strategy, load
from ditfastattn.export.aoti import checked, compilations, files
from ditfastattn.export.aoti.checked import Compilation
from ditfastattn.export.aoti.compile import compile_package
from ditfastattn.export.aoti.constants import Constants
from ditfastattn.export.aoti.options import CompileFor, compile_for
from ditfastattn.export.bundle import export_model
from ditfastattn.export.capture_call import RecordedCall
from ditfastattn.export.options import ExportOptions
from ditfastattn.passes.windows.window_attention import WINDOW_ATTENTION
from ditfastattn.runtime.aoti import load as loading
from ditfastattn.runtime.aoti.package import AotiPackage, PackageFile
from ditfastattn.runtime.bundle.files import open_bundle
from ditfastattn.runtime.bundle.manifest import MANIFEST, Format, manifest_text, read_manifest
from ditfastattn.runtime.bundle.packages import PackageInput, PackageSpec
from ditfastattn.runtime.bundle.transformer import BundleTransformer
from ditfastattn.tools.commands.export import export as export_command
from tests.export.helpers import export_anew, export_tiny
from tests.helpers import (
    STEPS,
    TinyModel,
    capture_every_site,
    largest_difference,
    make_plan,
    tiny_digits_pipeline,
    tiny_dit,
    tiny_sd3,
    uniform_strategies,
)
from tests.plans import plan_for

CPU = torch.device("cpu")
PT2 = ExportOptions(format=Format.PT2)
AT_BATCH_4 = ExportOptions(format=Format.PT2, dynamic_batch=False)


def small() -> tuple[TinyModel, list[tuple[Strategy, ...]], Any]:
    """Return a model of one layer; its plan computes half a batch, then shares that step."""
    tiny = tiny_dit(layers=1)
    _, sites = capture_every_site(tiny)
    rows = [(Strategy.SHARE_CFG,) * len(sites)]
    return tiny, rows + [(Strategy.SHARE_STEP,) * len(sites)] * (STEPS - 1), sites


def small_bundle(out: Path) -> tuple[TinyModel, list[Tensor]]:
    """Export it to ``out``, once a run; return the model and what the plan interpreter computes."""
    tiny, rows, sites = small()
    export_tiny(tiny, rows, out, options=PT2)
    return tiny, tiny.reference(rows, sites, CfgLayout.COND_FIRST)


def test_a_bundle_of_packages_equals_the_plan_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Loading neither compiles nor complains, so no compiler need be there."""
    tiny, expected = small_bundle(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with caplog.at_level(logging.WARNING):
        bundle = load(tmp_path, runtime="aoti")
        assert largest_difference(tiny.run(bundle), expected) < 2e-6
        assert largest_difference(tiny.run(bundle), expected) < 2e-6  # the next generation
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert bundle.providers == ("AOTInductor",)


def test_the_batch_of_packages_is_free(tmp_path: Path) -> None:
    tiny, four = small_bundle(tmp_path)
    bundle = load(tmp_path, runtime="aoti")
    assert bundle.manifest.fixed_batch == 0
    _, rows, sites = small()
    two = TinyModel(tiny.model, lambda step, _: tiny.call(step, 2))
    expected = two.reference(rows, sites, CfgLayout.COND_FIRST)
    assert largest_difference(tiny.run(bundle, 2), expected) < 2e-6  # one image, two halves
    eight = TinyModel(tiny.model, lambda step, _: tiny.call(step, 8))
    expected = eight.reference(rows, sites, CfgLayout.COND_FIRST)
    assert largest_difference(tiny.run(bundle, 8), expected) < 2e-6
    assert largest_difference(tiny.run(bundle, 4), four) < 2e-6
    with pytest.raises(ConfigError, match="a multiple of 2"):
        tiny.run(bundle, 3)


def test_a_package_is_given_the_strides_that_it_trusts(tmp_path: Path) -> None:
    tiny, _ = small_bundle(tmp_path)
    opened = open_bundle(tmp_path, Format.PT2)
    manifest, packages = opened.manifest, opened.manifest.packages
    assert packages is not None
    variant, spec = manifest.variants[0], packages.files[manifest.variants[0].file]
    weights = load(tmp_path, runtime="aoti").weights
    path = opened.path(variant.file)
    package = AotiPackage(PackageFile(path, str(path)), spec, weights, CPU)
    call = tiny.call(0, 4)
    given = [
        call[item.name] if item.name in call else torch.ones(item.sizes(4)) for item in spec.inputs
    ]
    caches = [_caches(manifest, variant, 4) for _ in range(2)]
    expected, got = ([torch.empty_like(given[0]), *each] for each in caches)
    package(given, expected)
    latent = given[0]
    other = latent.transpose(2, 3).contiguous().transpose(2, 3)  # equal, laid out differently
    assert torch.equal(other, latent)
    assert other.stride() != latent.stride() == spec.inputs[0].layout(4)
    package([other, *given[1:]], got)
    assert torch.equal(expected[0], got[0])
    trusting = package._loader.run([other, *given[1:]])[0]  # the trap: no error, another result
    assert float((trusting - expected[0]).abs().max()) > 1e-3
    with pytest.raises(EngineError, match="was compiled for"):
        package([latent.double(), *given[1:]], got)


def _caches(manifest: Any, variant: Any, batch: int) -> list[Tensor]:
    slots = {slot.name: slot for slot in manifest.slots}
    found = [slots[name] for name, _ in variant.writes]
    return [torch.empty(slot.sizes(batch), dtype=slot.torch_dtype) for slot in found]


def test_weights_are_written_once_and_each_package_takes_its_own(tmp_path: Path) -> None:
    tiny, _ = small_bundle(tmp_path)
    manifest = read_manifest(tmp_path)
    assert manifest.packages is not None
    taken = [set(manifest.packages.files[v.file].constants) for v in manifest.variants]
    with safe_open(tmp_path / manifest.weights, framework="pt") as file:
        assert set(file.keys()) == set.union(*taken, *_hoisted(manifest))
    assert any(len(each) < len(set.union(*taken)) for each in taken)
    named = {name for name, _ in tiny.model.named_parameters()}
    assert named <= set.union(*taken, *_hoisted(manifest))
    sizes = [manifest.files[v.file].bytes for v in manifest.variants]
    assert max(sizes) < 2.5 * 2**20


def _hoisted(manifest: Any) -> list[set[str]]:
    once = manifest.hoisted
    return [set(manifest.packages.files[once.file].constants)] if once else []


def test_a_weight_written_in_place_changes_every_step(tmp_path: Path) -> None:
    tiny, before = small_bundle(tmp_path)
    bundle = load(tmp_path, runtime="aoti")
    changed = copy.deepcopy(tiny.model)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.1)
                bundle.weights[name].add_(0.1)
    _, rows, _ = small()
    other = TinyModel(changed, tiny.call)
    _, sites = capture_every_site(other)
    expected = other.reference(rows, sites, CfgLayout.COND_FIRST)
    got = tiny.run(bundle)
    assert largest_difference(got, expected) < 1e-5
    assert all(float((a - b).abs().max()) > 1e-2 for a, b in zip(got, before, strict=True))
    again = load(tmp_path, runtime="aoti")  # the file is as it was
    assert largest_difference(tiny.run(again), before) < 2e-6


def _edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(manifest_text(data))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("torch", "2.99.0", "another version of torch(.|\n)*expected: 2.99.0(.|\n)*install torch"),
        ("machine", "aarch64", "another processor architecture(.|\n)*expected: aarch64"),
        ("features", ["amx_avx9"], "that this processor lacks(.|\n)*got: *no amx_avx9"),
        ("device", "cuda", "an NVIDIA GPU, and there is none here"),
    ],
)
def test_packages_for_another_machine_are_refused(
    field: str, value: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_bundle(tmp_path)
    _edit(tmp_path, lambda data: data["packages"]["target"].update({field: value}))
    monkeypatch.setattr(loading, "AotiPackage", None)  # it is refused before any is opened
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, runtime="aoti")


def test_a_package_that_wants_other_weights_is_refused(tmp_path: Path) -> None:
    small_bundle(tmp_path)

    def forget(data: dict[str, Any]) -> None:
        data["packages"]["files"]["variant_00.pt2"]["constants"].pop()

    _edit(tmp_path, forget)
    with pytest.raises(ConfigError, match="takes other weights than the manifest says"):
        load(tmp_path, runtime="aoti")


def test_each_runtime_refuses_the_other_format(tmp_path: Path) -> None:
    small_bundle(tmp_path / "pt2")
    with pytest.raises(ConfigError, match=r'format onnx(.|\n)*runtime="aoti"'):
        load(tmp_path / "pt2")
    with pytest.raises(ConfigError, match=r'format onnx(.|\n)*runtime="aoti"'):
        ditfastattn.build(tmp_path / "pt2", target="sm89")
    tiny, rows, _ = small()
    export_tiny(tiny, rows, tmp_path / "onnx")
    with pytest.raises(ConfigError, match=r'format pt2(.|\n)*runtime="onnx"'):
        load(tmp_path / "onnx", runtime="aoti")


def test_packages_have_no_loop(tmp_path: Path) -> None:
    options = ExportOptions(format=Format.PT2, loop=True)
    with pytest.raises(ConfigError, match="a loop is one ONNX graph"):
        export_anew(tiny_dit(), None, tmp_path / "bundle", options=options)
    small_bundle(tmp_path / "made")
    with pytest.raises(ConfigError, match="no unrolled loop"):
        load(tmp_path / "made", runtime="aoti").generate(torch.zeros(1, 4, 8, 8))


def test_engines_are_not_built_from_packages() -> None:
    with pytest.raises(ConfigError, match=r"built from ONNX graphs(.|\n)*--format onnx"):
        export_command(tensorrt=True, format=Format.PT2)


def test_equal_names_of_different_content_stay_apart() -> None:
    """A window's bias is called the same in every variant, and holds something else."""
    found = Constants()
    first, second = torch.zeros(3), torch.ones(3)
    names = [found.constant(first), found.constant(second), found.constant(torch.zeros(3))]
    assert names[0] != names[1]
    assert names[0] == names[2]
    assert found.weight("a.bias", first) == found.weight("a.bias", first) == "a.bias"
    other = found.weight("a.bias", second)
    assert other != "a.bias"
    assert torch.equal(found.tensors["a.bias"], first)
    assert torch.equal(found.tensors[other], second)
    assert found.weight("tied.bias", first) == "a.bias"  # one tensor has one name
    assert found.weight("b.bias", first.clone()) == "b.bias"  # equal now, maybe not later
    fused = torch.arange(4.0)
    found.weight("fused", fused)
    found.weight("part", fused[:2])  # a view: the file has it apart
    assert {name: t.tolist() for name, t in files._apart(found.tensors).items()}["part"] == [0, 1]
    turned = torch.arange(6.0).reshape(2, 3).T
    assert found.tensors[found.weight("turned", turned)].is_contiguous()


def test_an_unknown_instruction_set_is_refused(tmp_path: Path) -> None:
    options = ExportOptions(format=Format.PT2, isa="avx3")
    with pytest.raises(ConfigError, match=r"no such vector instructions(.|\n)*avx2, avx512"):
        export_anew(tiny_dit(layers=1), None, tmp_path / "bundle", options=options)
    pipeline, call = tiny_digits_pipeline(DDIMScheduler(clip_sample=False)), {"class_labels": [1]}
    with pytest.raises(ConfigError, match=r"export\(format\)"):
        ditfastattn.export(pipeline, call, None, tmp_path / "b", format="coreml")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write packages that hold nothing."""

    def accept(self: Compilation, content: bytes) -> bool:
        self.path.write_bytes(content)
        return True

    monkeypatch.setattr(compilations, "compile_package", lambda *_: b"package")
    monkeypatch.setattr(Compilation, "accept", accept)


def test_wrong_code_is_compiled_anew_for_narrower_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = CompileFor(compile_for(CPU).target, {"cpp.simdlen": 512})
    module = torch.fx.symbolic_trace(lambda x: (x,))
    spec = PackageSpec(
        inputs=(PackageInput(name="x", shape=(2, 4), dtype="float32", strides=(4, 1)),),
        constants=(),
    )
    widths: list[int] = []
    answers = {512: torch.full((2, 4), torch.nan), 256: torch.full((2, 4), 9.0)}

    class Package:
        def __init__(self, *_: Any) -> None:
            pass

        def run(self, inputs: list[Tensor]) -> list[Tensor]:
            return [answers.get(widths[-1], inputs[0])]

    monkeypatch.setattr(checked, "AotiPackage", Package)

    def compile_once() -> None:
        arguments: Any = (module, spec, {}, [torch.zeros(2, 4)], made)
        compilation, accepted = Compilation(tmp_path / "x.pt2", *arguments), False
        while not accepted:
            widths.append(compilation.options["cpp.simdlen"])
            accepted = compilation.accept(b"package")

    with pytest.raises(ConfigError, match=r"8 values that are not finite; .* of values up to"):
        compile_once()
    assert widths == [512, 256]
    assert not list(tmp_path.iterdir())
    del answers[256]
    compile_once()
    assert (tmp_path / "x.pt2").read_bytes() == b"package"
    assert "fault of the C++ compiler" in caplog.text


@pytest.mark.usefixtures("uncompiled")
def test_a_killed_export_compiles_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, rows, _ = small()
    plan = make_plan(tiny, rows, CfgLayout.COND_FIRST, feed_forwards=True)
    call, compiled = RecordedCall(tiny.call(0, 4)), [0]

    def compile_one(*_: Any) -> bytes:
        if compiled[0] == 1:
            raise KeyboardInterrupt
        compiled[0] += 1
        return b"package"

    monkeypatch.setattr(compilations, "compile_package", compile_one)
    with pytest.raises(KeyboardInterrupt):
        export_model(tiny.model, call, plan, tmp_path / "bundle", AT_BATCH_4)
    compiled[0] = -100
    manifest = export_model(tiny.model, call, plan, tmp_path / "bundle", AT_BATCH_4)
    graphs = len(manifest.variants) + (manifest.hoisted is not None)
    assert compiled[0] + 100 == graphs - 1
    names = {path.name for path in (tmp_path / "bundle").iterdir()}
    assert names == {*manifest.files, MANIFEST}


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
def test_packages_of_regions_do_not_grow_with_layers(tmp_path: Path) -> None:
    """Equal blocks of all layers and steps are one package, whose weights are inputs."""
    options = ExportOptions(format=Format.PT2, dynamic_batch=False, regions=True)
    made: list[set[str]] = []
    for layers in (3, 4):
        tiny = tiny_dit(layers=layers)
        _, sites = capture_every_site(tiny)
        rows = uniform_strategies(sites, Strategy.WINDOW_SHARE_CFG)
        manifest = export_anew(tiny, rows, tmp_path / str(layers), options=options)
        assert manifest.packages is not None
        made.append(set(manifest.packages.files))
        assert all(not package.constants for package in manifest.packages.files.values())
    assert made[0] == made[1]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("regions", [False, True])
def test_a_call_of_one_image_frees_the_batch(
    regions: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call of two rows, whose halves are one row each, shows too little of layouts."""
    monkeypatch.setattr(files, "free_batch", lambda *_: None)
    tiny = tiny_dit(size=16, layers=1)
    _, sites = capture_every_site(tiny)
    rows = uniform_strategies(sites, Strategy.WINDOW_SHARE_CFG)
    plan = make_plan(tiny, rows, CfgLayout.COND_FIRST, feed_forwards=True)
    options = ExportOptions(format=Format.PT2, regions=regions)
    call = RecordedCall(tiny.call(0, 2))
    manifest = export_model(tiny.model, call, plan, tmp_path / "bundle", options)
    assert manifest.fixed_batch == 0
    assert manifest.batch_multiple == 2


@pytest.mark.slow
def test_packages_of_regions_compute_the_model_at_any_batch(tmp_path: Path) -> None:
    tiny = tiny_dit(layers=2)
    export_tiny(tiny, None, tmp_path, options=ExportOptions(format=Format.PT2, regions=True))
    bundle = load(tmp_path, runtime="aoti")
    for batch in (1, 4):
        assert largest_difference(tiny.run(bundle, batch), tiny.run(tiny.model, batch)) < 2e-6


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x * self.scale * self.gain,)


@pytest.mark.slow
def test_small_weights_are_not_written_into_the_code(tmp_path: Path) -> None:
    """Inductor would write these as numbers, which no later weights replace."""
    module = torch.fx.symbolic_trace(Tiny())
    options = compile_for(CPU).options
    (tmp_path / "tiny.pt2").write_bytes(compile_package(module, [torch.zeros(2, 4)], options))
    spec = PackageSpec(
        inputs=(PackageInput(name="x", shape=(2, 4), dtype="float32", strides=(4, 1)),),
        constants=("scale", "gain"),
    )
    weights = {"scale": torch.ones(4), "gain": torch.tensor(3.0)}
    file = PackageFile(tmp_path / "tiny.pt2", str(tmp_path / "tiny.pt2"))
    package, result = AotiPackage(file, spec, weights, CPU), torch.empty(2, 4)
    package([torch.ones(2, 4)], [result])
    assert torch.equal(result, torch.full((2, 4), 3.0))
    with pytest.raises(ConfigError, match=r"lacks weights of the package(.|\n)*gain"):
        AotiPackage(file, spec, {"scale": torch.ones(4)}, CPU)
    path = tmp_path / "bad.pt2"
    path.write_bytes(b"not a package")
    with pytest.raises(ConfigError, match="torch cannot load the package"):
        AotiPackage(PackageFile(path, str(path)), spec, weights, CPU)


class Windowed(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (WINDOW_ATTENTION(x, x, x, 1, 1.0),)


@pytest.mark.slow
def test_operators_that_only_python_knows_are_refused() -> None:
    module = torch.fx.symbolic_trace(Windowed())
    with pytest.raises(ConfigError, match=r"only Python knows(.|\n)*window_attention"):
        compile_package(module, [torch.zeros(1, 1, 4, 8)], compile_for(CPU).options)


@pytest.mark.slow  # those of cross-attention: PixArt's, quantized (test_quantized_bundle.py)
def test_packages_of_joint_attention(tmp_path: Path) -> None:
    tiny = tiny_sd3(layers=1)
    _, sites = capture_every_site(tiny)
    rows = uniform_strategies(sites, Strategy.WINDOW_SHARE_CFG)
    export_tiny(tiny, rows, tmp_path, options=AT_BATCH_4)
    expected = tiny.reference(rows, sites, CfgLayout.COND_FIRST)
    assert largest_difference(tiny.run(load(tmp_path, runtime="aoti")), expected) < 1e-5


@pytest.mark.slow
def test_packages_in_bfloat16(tmp_path: Path) -> None:
    tiny, rows, sites = small()
    options = ExportOptions(format=Format.PT2, dtype="bfloat16", dynamic_batch=False)
    manifest = export_tiny(tiny, rows, tmp_path, options=options)
    assert manifest.model.dtype == "bfloat16"
    bundle = load(tmp_path, runtime="aoti")
    assert bundle.dtype == torch.bfloat16
    expected = tiny.reference(rows, sites, CfgLayout.COND_FIRST)
    low = TinyModel(tiny.model, lambda step, batch: _cast(tiny.call(step, batch)))
    got = [item.float() for item in low.run(bundle)]
    assert largest_difference(got, expected) < 0.1


def _cast(call: dict[str, Any]) -> dict[str, Any]:
    return {**call, "hidden_states": call["hidden_states"].bfloat16()}


@pytest.mark.slow
def test_a_pipeline_runs_by_packages_verifies_them_and_gives_them_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = tiny_digits_pipeline(DDIMScheduler(clip_sample=False))
    call = {"class_labels": [1, 2], "num_inference_steps": 4}
    plan = plan_for(pipeline, call, [Strategy.FULL, Strategy.SHARE_STEP] * 2)
    ditfastattn.export(pipeline, call, plan, tmp_path / "bundle", format="pt2", isa="avx2")
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.packages is not None
    assert manifest.packages.target.isa == "avx2"
    assert not any(name.startswith("avx512") for name in manifest.packages.target.features)
    found = ditfastattn.verify(tmp_path / "bundle", pipeline, call, runtime="aoti")
    assert found.passed
    assert max(found.step_errors) < 1e-5
    old = load(tmp_path / "bundle", runtime="aoti")
    with torch.no_grad():
        for parameter in pipeline.transformer.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.manual_seed(3)))
    with pytest.raises(ConfigError, match=r"plan\.model\.weights"):
        ditfastattn.verify(tmp_path / "bundle", pipeline, call, runtime="aoti")

    def refuse(*_: Any) -> bytes:
        raise AssertionError("a package is compiled anew")

    monkeypatch.setattr(compilations, "compile_package", refuse)
    updated = ditfastattn.update_weights(tmp_path / "bundle", pipeline, call)
    assert updated.packages == manifest.packages
    assert ditfastattn.verify(tmp_path / "bundle", pipeline, call, runtime="aoti").passed
    new = load(tmp_path / "bundle", runtime="aoti")  # who has loaded it before keeps the old ones
    assert not all(torch.equal(old.weights[name], item) for name, item in new.weights.items())
    pipeline.transformer = load(tmp_path / "bundle", runtime="aoti")  # type: ignore[assignment]
    assert isinstance(pipeline.transformer, BundleTransformer)
    images: Any = pipeline(**call, output_type="pt")
    assert images.images.shape == (2, 1, 16, 16)
