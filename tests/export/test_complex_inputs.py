"""Arguments that hold complex numbers are pairs of real ones to the graphs of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ditfastattn
from ditfastattn import ConfigError
from ditfastattn.export.bundle import export_model
from ditfastattn.export.capture_call import RecordedCall
from ditfastattn.export.options import ExportOptions
from ditfastattn.runtime.bundle.golden import compare_with_golden
from ditfastattn.runtime.bundle.manifest import Format, read_manifest
from tests.helpers import noise
from tests.runtime.test_traced import (
    SHARED,
    TIMESTEPS,
    WIDTH,
    Denoiser,
    handmade,
    largest_error,
    plan_for,
)


class Turned(Denoiser):
    """Turn tokens and words by angles that are given as complex numbers."""

    def forward(
        self, latent: Tensor, timestep: Tensor, words: Tensor, turns: Tensor
    ) -> tuple[Tensor]:
        text = self._turned(self.text(words), turns[:6]).mean(1, keepdim=True)
        tokens = torch.view_as_real(self._turned(self.embed(latent), turns) + text).flatten(-2)
        return (self.run(tokens, timestep),)

    def _turned(self, tokens: Tensor, turns: Tensor) -> Tensor:
        return torch.view_as_complex(tokens.reshape(*tokens.shape[:-1], -1, 2)) * turns


def call_turned(batch: int, timestep: float) -> dict[str, Any]:
    angles = noise(3, 16, WIDTH // 2)
    return {
        "latent": noise(0, batch, 16, 4),
        "timestep": torch.full((batch,), timestep),
        "words": noise(1, batch, 6, 6),
        "turns": torch.polar(torch.ones_like(angles), angles),
    }


def exported(folder: Path, form: Format) -> Path:
    model, call = handmade(Turned).build(), call_turned(2, TIMESTEPS[0])
    plan = plan_for(model, call, *SHARED) if form is Format.ONNX else None  # one package
    options = ExportOptions(format=form)
    export_model(model, RecordedCall(call), plan, folder, options)
    return folder


def assert_equals_the_model(folder: Path, batch: int) -> None:
    model, bundle = handmade(Turned).build(), ditfastattn.load(folder)
    call = call_turned(batch, TIMESTEPS[0])
    with torch.no_grad():
        expected = model(**call)[0]
    pairs = {**call, "turns": torch.view_as_real(call["turns"])}
    for given in (call, pairs):
        bundle.reset()
        assert largest_error([bundle(**given)[0]], [expected]) < 1e-5
    assert max(compare_with_golden(folder, bundle).steps) < 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("complex") / "bundle", Format.ONNX)


def test_a_bundle_takes_complex_numbers_or_their_parts(folder: Path) -> None:
    assert_equals_the_model(folder, batch=3)
    manifest = read_manifest(folder)
    given = {spec.name: (spec.pairs, spec.shape[1:], spec.dtype) for spec in manifest.inputs}
    assert given["turns"] == (True, (8, 2), "float32")
    assert not given["words"][0]
    assert manifest.hoisted is not None  # the words, turned


def test_openvino_takes_them_too(folder: Path) -> None:
    call = call_turned(2, TIMESTEPS[0])
    with torch.no_grad():
        expected = handmade(Turned).build()(**call)[0]
    assert (
        largest_error([ditfastattn.load(folder, runtime="openvino")(**call)[0]], [expected]) < 1e-5
    )


def test_other_shapes_of_them_are_refused(folder: Path) -> None:
    call = call_turned(2, TIMESTEPS[0])
    with pytest.raises(ConfigError, match=r"'turns'[\s\S]*got: +\[16, 4, 2\][\s\S]*\[16, 8, 2\]"):
        ditfastattn.load(folder)(**{**call, "turns": call["turns"][:, :4]})


class Complex(Turned):
    def forward(
        self, latent: Tensor, timestep: Tensor, words: Tensor, turns: Tensor
    ) -> tuple[Tensor]:
        return (torch.view_as_complex(self.run(self.embed(latent), timestep)[..., :2]),)


def test_results_that_are_complex_are_refused(tmp_path: Path) -> None:
    call = RecordedCall(call_turned(2, TIMESTEPS[0]))
    with pytest.raises(ConfigError, match=r"returns complex numbers[\s\S]*view_as_real"):
        export_model(handmade(Complex).build(), call, None, tmp_path / "bundle")


@pytest.mark.slow  # it compiles
def test_a_package_takes_them_too(tmp_path: Path) -> None:
    folder = exported(tmp_path / "bundle", Format.PT2)
    model, bundle = handmade(Turned).build(), ditfastattn.load(folder, runtime="aoti")
    call = call_turned(2, TIMESTEPS[0])
    with torch.no_grad():
        expected = model(**call)[0]
    assert largest_error([bundle(**call)[0]], [expected]) < 1e-5
