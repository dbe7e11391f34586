"""A bundle's loop as a model of Triton Inference Server.

No server runs here: docs/production.md says what was run by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]  # it has no annotations
import pytest
import torch
from google.protobuf.json_format import MessageToJson
from torch import Tensor

from ditfastattn import CfgLayout, ConfigError, Strategy, export_triton, load
from ditfastattn.core.errors import VerifyError
from ditfastattn.export.options import ExportOptions
from ditfastattn.export.triton import python_model, repository
from ditfastattn.export.triton.config import read_config
from ditfastattn.runtime.bundle.manifest import read_manifest
from tests.export.helpers import ddim_stepping, export_once, export_tiny
from tests.helpers import (
    TINY_MODELS,
    TinyModel,
    capture_every_site,
    make_plan,
    mixed_strategies,
    tiny_dit,
    uniform_strategies,
)
from tests.tiers import slow_but
from tests.works_with import works_with

NUMPY = {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64, "TYPE_BOOL": np.bool_}


def bundle_with_loop(
    out: Path, tiny: TinyModel, layout: CfgLayout = CfgLayout.COND_FIRST, fixed: bool = False
) -> Path:
    """Put a bundle with a loop into ``out``; guidance matters to it."""
    sites = capture_every_site(tiny)[1]
    if layout.batched:
        rows = mixed_strategies(sites, seed=5)
    else:
        rows = uniform_strategies(sites, Strategy.SHARE_STEP)
    plan = make_plan(tiny, rows, layout, feed_forwards=True)
    sampler = plan.sampler.model_copy(update={"guidance_scale": 3.0 if layout.batched else None})
    plan = plan.model_copy(update={"sampler": sampler})
    options = ExportOptions(loop=True, dynamic_batch=not fixed)
    export_once(tiny, plan, out, options, ddim_stepping(tiny, plan))
    return out


def given_to(bundle: Path, tiny: TinyModel, images: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return noise and conditions of some images, as the bundle's loop takes them."""
    manifest = read_manifest(bundle)
    assert manifest.loop is not None
    rows = images * (2 if manifest.sampler.cfg_layout.batched else 1)
    call = tiny.call(0, rows)
    conditions = {spec.name: call[spec.name] for spec in manifest.loop.conditions}
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(manifest.loop.noise.sizes(rows), generator=generator)
    return noise, conditions


def as_requested(
    noise: Tensor, conditions: dict[str, Tensor], layout: CfgLayout
) -> dict[str, np.ndarray[Any, Any]]:
    """Return the model's inputs: each guidance branch has its own."""
    found = {"noise": noise.numpy()}
    for name, rows in conditions.items():
        halves = rows.chunk(2) if layout.batched else (rows,)
        names = [name, f"unconditional_{name}"][: len(halves)]
        turn = -1 if layout is CfgLayout.UNCOND_FIRST else 1
        for each, half in zip(names[::turn], halves, strict=True):
            found[each] = half.numpy()
    return found


def shape_of(port: Any, joins: bool) -> tuple[int, ...]:
    """Return a port's shape as Triton compares it with the graph's, -1 for what is free."""
    dims = port.reshape.shape if port.HasField("reshape") else port.dims
    return (*((-1,) if joins else ()), *dims)


def open_graph(version: Path) -> Any:
    return onnxruntime.InferenceSession(version / "model.onnx", providers=["CPUExecutionProvider"])


@works_with(
    "Serving",
    "a bundle with a loop, as a model of Triton Inference Server",
    "works",
    "requests are joined where the batch is free",
)
@pytest.mark.parametrize(
    ("name", "layout"),
    slow_but(
        [("pixart", CfgLayout.COND_FIRST)],
        [(name, layout) for name in TINY_MODELS for layout in CfgLayout if layout.calls == 1],
    ),
)
def test_the_model_is_the_bundles_loop_and_joins_requests(
    name: str, layout: CfgLayout, tmp_path: Path
) -> None:
    tiny = TINY_MODELS[name]()
    bundle = bundle_with_loop(tmp_path / "tiny", tiny, layout)
    version = export_triton(bundle, tmp_path / "models", images=8)
    assert version == tmp_path / "models" / "tiny" / "1"
    config = read_config(version.parent / "config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "onnxruntime", 8)
    assert config.HasField("dynamic_batching")

    session = open_graph(version)
    graph = {port.name: port for port in (*session.get_inputs(), *session.get_outputs())}
    ports = [*config.input, *config.output]
    assert {port.name for port in ports} == set(graph)
    for port in ports:
        found = [size if isinstance(size, int) else -1 for size in graph[port.name].shape]
        assert tuple(found) == shape_of(port, joins=True)

    noise, conditions = given_to(bundle, tiny, 3)
    feeds = as_requested(noise, conditions, layout)
    types = {port.name: port.data_type for port in config.input}
    kinds = config.input[0].DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    for given, array in feeds.items():
        assert NUMPY[kinds[types[given]].name] == array.dtype
    together = session.run(["latents"], feeds)[0]
    apart = [
        session.run(["latents"], {key: item[part] for key, item in feeds.items()})[0]
        for part in (slice(0, 1), slice(1, 3))
    ]
    np.testing.assert_allclose(together, np.concatenate(apart), atol=2e-5)
    expected = load(bundle).generate(noise, **conditions)
    np.testing.assert_allclose(together, expected.numpy(), atol=2e-5)
    if layout.batched:  # the branches are told apart
        swapped = {**feeds}
        first = next(key for key in feeds if f"unconditional_{key}" in feeds)
        swapped[first], swapped[f"unconditional_{first}"] = (
            feeds[f"unconditional_{first}"],
            feeds[first],
        )
        assert np.abs(session.run(["latents"], swapped)[0] - together).max() > 1e-3


def test_a_fixed_batch_is_not_joined(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny = tiny_dit()
    bundle = bundle_with_loop(tmp_path / "tiny", tiny, fixed=True)
    version = export_triton(bundle, tmp_path / "models")
    assert "requests are not joined" in caplog.text
    config = read_config(version.parent / "config.pbtxt")
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    noise, conditions = given_to(bundle, tiny, 2)
    assert [tuple(port.dims) for port in config.input] == [tuple(noise.shape), (4,)]
    feeds = {"noise": noise.numpy(), "class_labels": conditions["class_labels"].numpy()}
    found = open_graph(version).run(["latents"], feeds)[0]
    expected = load(bundle).generate(noise, **conditions).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_the_warm_up_is_a_request_of_the_model(tmp_path: Path) -> None:
    bundle = bundle_with_loop(tmp_path / "tiny", TINY_MODELS["pixart"]())
    version = export_triton(bundle, tmp_path / "models")
    config = read_config(version.parent / "config.pbtxt")
    (warm_up,) = config.model_warmup
    assert set(warm_up.inputs) == {port.name for port in config.input}
    for port in config.input:
        assert list(warm_up.inputs[port.name].dims) == list(port.dims)
        assert warm_up.inputs[port.name].data_type == port.data_type


class FakeTriton:
    """What Triton's Python backend gives its models, as far as ours uses it."""

    class Tensor:
        def __init__(self, name: str, array: np.ndarray[Any, Any]) -> None:
            self.name, self._array = name, array

        def as_numpy(self) -> np.ndarray[Any, Any]:
            return self._array

    class TritonError(Exception):
        pass

    @staticmethod
    def get_input_tensor_by_name(request: dict[str, Any], name: str) -> Any:
        return FakeTriton.Tensor(name, request[name])

    @staticmethod
    def InferenceResponse(tensors: Sequence[Any] = (), error: Any = None) -> Any:  # noqa: N802  # Triton's name
        return SimpleNamespace(tensors=tensors, error=error)


def test_the_python_model_joins_requests_and_serves_no_nan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_dit()
    bundle = bundle_with_loop(tmp_path / "tiny", tiny)
    version = export_triton(bundle, tmp_path / "models", backend="python")
    assert (version / "model.py").read_text() == Path(python_model.__file__).read_text()
    config = read_config(version.parent / "config.pbtxt")
    assert config.backend == "python"
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", FakeTriton)
    model = python_model.TritonPythonModel()
    described = MessageToJson(config, preserving_proto_field_name=True)
    model.initialize(
        {
            "model_config": described,
            "model_repository": str(version.parent),
            "model_version": "1",
            "model_instance_kind": "CPU",
        }
    )
    assert json.loads(described)["max_batch_size"] == 4
    noise, conditions = given_to(bundle, tiny, 3)
    noise[0] = torch.nan
    feeds = as_requested(noise, conditions, CfgLayout.COND_FIRST)
    parts = slice(0, 1), slice(1, 3)
    answers = model.execute([{key: item[part] for key, item in feeds.items()} for part in parts])
    assert "not finite" in str(answers[0].error)
    assert answers[0].tensors == ()
    expected = load(bundle).generate(noise, **conditions)[1:]
    assert answers[1].error is None
    (latents,) = answers[1].tensors
    assert latents.name == "latents"
    np.testing.assert_allclose(latents.as_numpy(), expected.numpy(), atol=2e-5)


def test_another_export_is_a_new_version_and_the_operators_settings_stay(tmp_path: Path) -> None:
    bundle, models = bundle_with_loop(tmp_path / "tiny", tiny_dit()), tmp_path / "models"
    first = export_triton(bundle, models)
    path = first.parent / "config.pbtxt"
    edited = path.read_text().replace("count: 1", "count: 2")
    path.write_text(edited)
    second = export_triton(bundle, models)
    assert second == first.with_name("2")
    assert path.read_text() == edited
    assert {file.name for file in second.iterdir()} == {"model.onnx", "weights.bin"}
    before = {file: file.read_bytes() for file in models.rglob("*") if file.is_file()}
    with pytest.raises(ConfigError, match=r"max_batch_size: .* another one(.|\n)*another name"):
        export_triton(bundle, models, images=8)
    with pytest.raises(ConfigError, match=r"config\.pbtxt: backend"):
        export_triton(bundle, models, backend="python")
    assert before == {file: file.read_bytes() for file in models.rglob("*") if file.is_file()}


def test_an_export_that_fails_leaves_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise VerifyError("not sound")

    bundle, models = bundle_with_loop(tmp_path / "tiny", tiny_dit()), tmp_path / "models"
    with monkeypatch.context() as patch:
        patch.setattr(repository, "lint", fail)
        with pytest.raises(VerifyError):
            export_triton(bundle, models)
    assert list(models.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "models"}
    assert export_triton(bundle, models).is_dir()


def test_what_cannot_be_a_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, models = tmp_path / "plain", tmp_path / "models"
    export_tiny(tiny_dit(), None, plain)
    with pytest.raises(ConfigError, match=r"no unrolled loop(.|\n)*--loop(.|\n)*ditfastattn serve"):
        export_triton(plain, models)
    assert not models.exists()
    bundle = bundle_with_loop(tmp_path / "a model", tiny_dit())
    with pytest.raises(ConfigError, match=r"cannot have that name(.|\n)*a model"):
        export_triton(bundle, models)
    with pytest.raises(ConfigError, match=r"export_triton\(backend\)(.|\n)*python"):
        export_triton(bundle, models, name="model", backend="tensorrt")
    with pytest.raises(ConfigError, match="at least one image"):
        export_triton(bundle, models, name="model", images=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="a model repository is a folder"):
        export_triton(bundle, tmp_path / "file", name="model")
    (models / "model").mkdir(parents=True)
    (models / "model" / "config.pbtxt").write_text("no: such entry")
    with pytest.raises(ConfigError, match=r"not the configuration of a Triton model"):
        export_triton(bundle, models, name="model")
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    with pytest.raises(ConfigError, match=r"not installed(.|\n)*ditfastattn\[triton\]"):
        export_triton(bundle, models, name="other")
