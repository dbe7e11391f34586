"""A bundle that is broken, foreign or malicious is refused with a clear error."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from ditfastattn import ConfigError, EngineError, Strategy, load
from ditfastattn.runtime.bundle.manifest import MANIFEST, file_hash, manifest_text
from ditfastattn.runtime.bundle.onnx_graph import OnnxGraph, import_onnxruntime
from tests.export.helpers import export_tiny
from tests.helpers import capture_every_site, largest_difference, tiny_dit, uniform_strategies

Data = dict[str, Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a sound bundle; tests work on copies."""
    tiny = tiny_dit()
    _, sites = capture_every_site(tiny)
    folder = tmp_path_factory.mktemp("whole") / "bundle"
    export_tiny(tiny, uniform_strategies(sites, Strategy.SHARE_STEP), folder)
    return folder


@pytest.fixture
def bundle(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "bundle")
    return tmp_path / "bundle"


def edit(bundle: Path, change: Callable[[Data], Any]) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    change(data)
    (bundle / MANIFEST).write_text(manifest_text(data))


def test_a_truncated_file_is_named_with_its_sizes(bundle: Path) -> None:
    weights = bundle / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"weights\.bin: the file is incomplete(.|\n)*bytes"):
        load(bundle)


def test_a_changed_number_of_the_manifest_is_noticed(bundle: Path) -> None:
    text = (bundle / MANIFEST).read_text()
    changed = text.replace('"factors": [', '"factors": [ ').replace('"steps": 6', '"steps": 7')
    assert changed != text
    (bundle / MANIFEST).write_text(changed)
    with pytest.raises(ConfigError, match="manifest has changed since it was exported"):
        load(bundle)


@pytest.mark.parametrize("name", ["weights.bin", "variant_00.onnx", "plan.json"])
def test_a_changed_byte_is_noticed(name: str, bundle: Path) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(ConfigError, match="has changed since it was exported"):
        load(bundle)


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / "variant_01.onnx").unlink()
    with pytest.raises(ConfigError, match=r"variant_01\.onnx: the file is missing"):
        load(bundle)


@pytest.mark.parametrize("version", [2, 7, True, 3.0])
def test_a_manifest_of_another_version_is_refused(bundle: Path, version: int) -> None:
    edit(bundle, lambda data: data.update(schema_version=version))
    message = rf"another schema version(.|\n)*got: +{version}(.|\n)*expected: +3 or 4 or 5 or 6"
    with pytest.raises(ConfigError, match=message):
        load(bundle)


def test_a_bundle_of_an_earlier_schema_loads(bundle: Path) -> None:
    def older(data: Data) -> None:
        data["schema_version"] = 3
        for name in ("stepping", "golden", "second"):
            del data[name]
        del data["files"]["golden.safetensors"]

    edit(bundle, older)
    (bundle / "golden.safetensors").unlink()
    assert load(bundle).manifest.schema_version == 3


def test_an_absent_or_broken_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no bundle"):
        load(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "..\\x", "C:x", ""])
def test_a_path_out_of_the_bundle_is_refused(name: str, bundle: Path) -> None:
    spec = {"bytes": 1, "sha256": "0" * 64}
    edit(bundle, lambda data: data["files"].update({name: spec}))
    with pytest.raises(ConfigError, match="not inside the bundle"):
        load(bundle)


def test_a_link_out_of_the_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.bin"
    shutil.move(bundle / "weights.bin", outside)
    (bundle / "weights.bin").symlink_to(outside)
    with pytest.raises(ConfigError, match="outside the bundle"):
        load(bundle)


@pytest.mark.parametrize("name", ["manifest.json", "weights.bin", "plan.json", "variant_00.onnx"])
def test_what_is_not_a_regular_file_is_refused(name: str, bundle: Path) -> None:
    path = bundle / name
    path.unlink()
    os.mkfifo(path)  # to open one waits for a writer
    with pytest.raises(ConfigError, match=rf"{name}(.|\n)*expected: a regular file"):
        load(bundle)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(ConfigError, match=rf"{name}(.|\n)*symbolic links"):
        load(bundle)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "x/" * 2000 + "x", "a\nb"])
def test_a_name_that_no_file_has_is_refused(name: str, bundle: Path) -> None:
    spec = {"bytes": 1, "sha256": "0" * 64}
    edit(bundle, lambda data: data["files"].update({name: spec}))
    with pytest.raises(ConfigError, match="not the name of a file of a bundle"):
        load(bundle)
    with pytest.raises(ConfigError, match="there is no bundle"):
        load(bundle / name)


@pytest.mark.parametrize("ending", ["json", "textproto", "onnxtxt", "bin"])
def test_a_graph_is_onnx_whatever_its_name(ending: str, bundle: Path) -> None:
    expected, tiny = tiny_dit().run(load(bundle)), tiny_dit()
    name = f"graph.{ending}"

    def rename(data: Data) -> None:
        (bundle / "variant_00.onnx").rename(bundle / name)
        data["files"][name] = data["files"].pop("variant_00.onnx")
        data["variants"][0]["file"] = name

    edit(bundle, rename)
    assert largest_difference(tiny.run(load(bundle)), expected) == 0.0


def test_a_graph_that_is_another_file_is_refused(bundle: Path) -> None:
    edit(bundle, lambda data: data["variants"][0].update(file="plan.json"))
    with pytest.raises(ConfigError, match="not ONNX"):
        load(bundle)


def test_nan_in_both_halves_is_the_same_latent(tmp_path: Path) -> None:
    tiny = tiny_dit()
    _, sites = capture_every_site(tiny)
    export_tiny(tiny, uniform_strategies(sites, Strategy.SHARE_CFG), tmp_path / "bundle")
    call = tiny.call(0, 4)
    (result,) = load(tmp_path / "bundle")(**{**call, "hidden_states": call["hidden_states"] * nan})
    assert bool(result.isnan().all())  # as the model's own


def test_latents_that_overflow_are_refused_where_torch_and_runtimes_part(bundle: Path) -> None:
    tiny = tiny_dit()
    loaded, call = load(bundle), tiny.call(0, 4)
    with pytest.raises(ConfigError, match="too large to be computed with"):
        loaded(**{**call, "hidden_states": call["hidden_states"] * 1e37})
    large = {**call, "hidden_states": call["hidden_states"] * 1e14}
    with torch.no_grad():
        expected = tiny.model(**large)[0]
    assert float((loaded(**large)[0] - expected).abs().max()) < 1e-4


@pytest.mark.parametrize("planned", [True, False])
def test_an_empty_batch_is_refused(planned: bool, bundle: Path, tmp_path: Path) -> None:
    tiny = tiny_dit()
    if not planned:
        export_tiny(tiny, None, tmp_path / "dense")
    empty = {k: v[:0] if isinstance(v, torch.Tensor) else v for k, v in tiny.call(0, 4).items()}
    with pytest.raises(ConfigError, match="the batch is empty"):
        load(bundle if planned else tmp_path / "dense")(**empty)


def test_a_timestep_without_dimensions_is_refused_as_such(bundle: Path) -> None:
    tiny = tiny_dit()
    loaded, call = load(bundle), tiny.call(0, 4)
    for bad in (call["timestep"][0], call["timestep"][0].double()):
        with pytest.raises(ConfigError, match=r"'timestep'[\s\S]*without dim[\s\S]*expand\(4\)"):
            loaded(**{**call, "timestep": bad})
    assert loaded(**call)[0].isfinite().all()


def refer_elsewhere(path: Path, location: str) -> None:
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "plan.json"])
def test_a_graph_that_refers_to_another_file_is_refused(location: str, bundle: Path) -> None:
    path = bundle / "variant_00.onnx"
    refer_elsewhere(path, location)
    spec = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
    edit(bundle, lambda data: data["files"].update({path.name: spec}))
    with pytest.raises(ConfigError, match="not the bundle's weights"):
        load(bundle)


def bomb(graph: onnx.GraphProto) -> None:
    """Compute 4 GiB of zeros from a size alone."""
    zeros = helper.make_node("ConstantOfShape", ["gib"], ["zeros"])
    graph.initializer.append(numpy_helper.from_array(np.array([2**30]), "gib"))
    graph.node.insert(0, zeros)


def bomb_of_an_input(graph: onnx.GraphProto) -> None:
    """Compute as much, from the shape of an input."""
    times = numpy_helper.from_array(np.array([2**27, 1, 1, 1]), "times")
    graph.initializer.append(times)
    graph.node.insert(0, helper.make_node("Shape", ["hidden_states"], ["shape"]))
    graph.node.insert(1, helper.make_node("Mul", ["shape", "times"], ["large"]))
    graph.node.insert(2, helper.make_node("ConstantOfShape", ["large"], ["zeros"]))


def branch(graph: onnx.GraphProto) -> None:
    inner = helper.make_graph([], "inner", [], [])
    graph.node.insert(
        0, helper.make_node("If", ["timestep"], [], then_branch=inner, else_branch=inner)
    )


def huge_tensor(graph: onnx.GraphProto) -> None:
    graph.initializer.append(onnx.TensorProto(name="huge", data_type=1, dims=[2**40]))


def hidden_file(graph: onnx.GraphProto) -> None:
    tensor = onnx.TensorProto(name="file", data_type=1, dims=[1])
    tensor.external_data.add(key="location", value="/etc/passwd")
    graph.node.insert(0, helper.make_node("Where", ["timestep"], ["out"], value=tensor))


def beyond_the_end(graph: onnx.GraphProto) -> None:
    tensor = next(t for t in graph.initializer if t.external_data)
    for entry in tensor.external_data:
        if entry.key == "offset":
            entry.value = str(2**40)


def foreign(graph: onnx.GraphProto) -> None:
    graph.node.insert(0, helper.make_node("Gelu", ["timestep"], ["out"], domain="com.microsoft"))


def dead_node(graph: onnx.GraphProto) -> None:
    graph.node.insert(0, helper.make_node("Identity", ["timestep"], ["out"]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (bomb, "depends on no input"),
        (bomb_of_an_input, "larger or smaller than the manifest says"),
        (branch, "holds a graph"),
        (huge_tensor, "tensor of another size"),
        (hidden_file, "refers to a file that is not the bundle's weights"),
        (beyond_the_end, "other weights than its tensor needs"),
        (foreign, "not an operator of ONNX"),
        (dead_node, "larger or smaller than the manifest says"),
    ],
)
def test_a_graph_that_no_export_writes_is_refused_before_a_runtime_reads_it(
    change: Callable[[onnx.GraphProto], None],
    said: str,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = bundle / "variant_00.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    path.write_bytes(model.SerializeToString())
    spec = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
    edit(bundle, lambda data: data["files"].update({path.name: spec}))
    monkeypatch.setattr(import_onnxruntime(), "InferenceSession", None)
    with pytest.raises(ConfigError, match=said):
        load(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["schedule"].pop(), "schedule"),
        (lambda d: d["schedule"].__setitem__(0, 99), "variants"),
        (lambda d: d["schedule"].__setitem__(0, 1), "no step has written"),
        (lambda d: d["files"].pop("weights.bin"), "not among the files"),
        (lambda d: d.update(timestep="when"), "is not an input"),
        (lambda d: d["variants"][0].update(inputs=["other"]), "the model lacks"),
        (lambda d: d.update(surprise=1), "Extra inputs"),
        (lambda d: d["slots"].clear(), "is not a slot"),
        (lambda d: d["slots"][0]["lives"][0].__setitem__(1, 6), "step 6, after the last one"),
        (lambda d: d["factors"][0].update(numerator=1.0), "'numerator' does not name a cache slot"),
        (lambda d: d["variants"][0]["writes"].append(["numerator", "x"]), "not name a cache slot"),
        (lambda d: d["files"].pop("plan.json"), "plan_sha256"),
        (lambda d: d.update(plan_sha256="0" * 64), "plan_sha256"),
        (lambda d: d.update(latent="picture"), "latent: 'picture' is not an input"),
        (lambda d: d["inputs"][0].update(dtype="float8"), "'float32'"),
        (lambda d: d["inputs"][0].update(dtype="int64"), "the inputs of the graph differ"),
        (lambda d: d["slots"][0]["shape"].append(2**40), "the outputs of the graph differ"),
        (lambda d: d["outputs"][0].update(name="image"), "the outputs of the graph differ"),
        (lambda d: d["model"].update(dtype="__class__"), "'float32'"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(
    change: Callable[[Data], Any], message: str, bundle: Path
) -> None:
    edit(bundle, change)
    with pytest.raises(ConfigError, match=message):
        load(bundle)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)


def places(item: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of each value in ``item``."""
    inner = item.items() if isinstance(item, dict) else enumerate(item)
    found: list[tuple[Any, ...]] = []
    for key, value in inner:
        found.append((*path, key))
        if isinstance(value, (dict, list)):
            found += places(value, (*path, key))
    return found


def holder_of(content: Data, place: tuple[Any, ...]) -> Any:
    found: Any = content
    for key in place[:-1]:
        found = found[key]
    return found


def damage(content: Data, data: st.DataObject) -> None:
    """Put something else in a place, or nothing, or what stands in another place."""
    known = places(content)
    place = data.draw(st.sampled_from(known))
    holder = holder_of(content, place)
    match data.draw(st.sampled_from(["put", "drop", "copy", "more"])):
        case "put":
            holder[place[-1]] = data.draw(JSON)
        case "drop":
            del holder[place[-1]]
        case "copy":
            other = data.draw(st.sampled_from(known))
            holder[place[-1]] = copy.deepcopy(holder_of(content, other)[other[-1]])
        case "more" if isinstance(holder, list):
            holder.insert(place[-1], copy.deepcopy(holder[place[-1]]))


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_manifest_is_run_or_refused(bundle: Path, whole: Path, data: st.DataObject) -> None:
    """Whatever the manifest says, of files that are whole: there is no other kind of error."""
    content = json.loads((whole / MANIFEST).read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        if places(content):
            damage(content, data)
    (bundle / MANIFEST).write_text(manifest_text(content))
    tiny = tiny_dit()
    with suppress(ConfigError, EngineError):  # any other error fails
        tiny.run(load(bundle))


def test_another_resolution_is_refused(bundle: Path) -> None:
    transformer = load(bundle)
    call = tiny_dit().call(0, 4)
    larger = {**call, "hidden_states": torch.zeros(4, 4, 16, 16)}
    with pytest.raises(ConfigError, match=r"another shape(.|\n)*got: +\[4, 4, 16, 16\]"):
        transformer(**larger)
    wrong = {**call, "hidden_states": call["hidden_states"].to(torch.int64)}
    with pytest.raises(ConfigError, match="another dtype"):
        transformer(**wrong)


def test_different_lanes_are_refused_where_guidance_is_shared(tmp_path: Path) -> None:
    tiny = tiny_dit()
    _, sites = capture_every_site(tiny)
    export_tiny(tiny, uniform_strategies(sites, Strategy.SHARE_CFG), tmp_path / "bundle")
    call = tiny.call(0, 4)
    different = torch.arange(4.0)[:, None, None, None] + call["hidden_states"]
    with pytest.raises(ConfigError, match="different latents"):
        load(tmp_path / "bundle")(**{**call, "hidden_states": different})


def test_a_provider_that_is_not_there_is_an_error(bundle: Path) -> None:
    with pytest.raises(ConfigError, match=r"did not load(.|\n)*CUDAExecutionProvider"):
        load(bundle, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])


def test_a_provider_that_falls_back_in_silence_is_an_error(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime lists a provider that it was built with, and goes on without it."""
    runtime = import_onnxruntime()
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(runtime, "get_available_providers", lambda: listed)
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(ConfigError, match=r"did not load(.|\n)*got: +CUDA"),
    ):
        load(bundle, providers=listed)


def test_a_session_that_dies_leaves_no_half_generation(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_dit()
    transformer = load(bundle)
    expected = tiny.run(transformer)
    call = OnnxGraph.__call__
    runs: list[int] = []

    def failing(self: OnnxGraph, *args: Any) -> Any:
        runs.append(1)
        if len(runs) == 3:
            raise EngineError("variant_01.onnx: ONNX Runtime failed: out of memory")
        return call(self, *args)

    monkeypatch.setattr(OnnxGraph, "__call__", failing)
    with pytest.raises(EngineError, match="out of memory"):
        tiny.run(transformer)
    assert largest_difference(tiny.run(transformer), expected) == 0.0


def test_a_run_that_onnxruntime_refuses_is_an_engine_error(bundle: Path) -> None:
    transformer = load(bundle)
    graph: Any = transformer._engines[0]
    results = [torch.empty(4, 4, 8, 8)] * len(graph._outputs)
    with pytest.raises(EngineError, match=r"variant_00\.onnx: ONNX Runtime failed"):
        graph([torch.zeros(1, 2, 3)] * len(graph._inputs), results)


SHARED_POOL = """
import sys
from ditfastattn import load
from tests.helpers import largest_difference, tiny_dit
tiny = tiny_dit()
bundle = load(sys.argv[1], threads=2, share_threads=True)
print(largest_difference(tiny.run(bundle), tiny.run(bundle)))
"""


@pytest.mark.slow
def test_sessions_share_one_pool_of_threads(bundle: Path) -> None:
    """In a process of its own: every session of a process must then ask for the pool."""
    command = [sys.executable, "-c", SHARED_POOL, str(bundle)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert float(done.stdout) == 0.0


@pytest.mark.parametrize("low_memory", [False, True])
def test_memory_modes_agree(low_memory: bool, bundle: Path) -> None:
    tiny = tiny_dit()
    expected = tiny.run(load(bundle))
    assert largest_difference(tiny.run(load(bundle, low_memory=low_memory)), expected) < 1e-5
