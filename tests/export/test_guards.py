"""A bundle of a graph that holds for what the model reads of its inputs compares their content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ditfastattn
from ditfastattn import ConfigError, export_triton
from ditfastattn.export.bundle import export_model
from ditfastattn.export.capture_call import RecordedCall
from ditfastattn.export.emitter import Value
from ditfastattn.export.options import ExportOptions
from ditfastattn.export.step_graphs import spec
from ditfastattn.runtime.bundle.guards import guard_of
from ditfastattn.runtime.bundle.manifest import read_manifest
from tests.export.test_triton import bundle_with_loop
from tests.helpers import noise, tiny_dit
from tests.runtime.test_traced import (
    SHARED,
    TIMESTEPS,
    Packed,
    call_batch,
    generate,
    handmade,
    largest_error,
    plan_for,
)
from tests.works_with import works_with

FIXED = ExportOptions(dynamic_batch=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dense bundle whose graph picks the words that its mask shows."""
    made = tmp_path_factory.mktemp("guards") / "bundle"
    call = RecordedCall(call_batch(2, TIMESTEPS[0]))
    export_model(handmade(Packed).build(), call, None, made, FIXED)
    return made


def test_a_bundle_of_what_the_model_reads_equals_the_model(folder: Path) -> None:
    bundle, model = ditfastattn.load(folder), handmade(Packed).build()
    found = generate(bundle, call_batch, (5, 3))
    assert largest_error(found, generate(model, call_batch, (5, 3))) < 1e-6


def test_the_manifest_holds_the_content_that_is_read(folder: Path) -> None:
    (guard,) = read_manifest(folder).guards
    assert guard.name == "mask"
    assert guard.runs == ((True, 5), (False, 1), (True, 3), (False, 3))
    assert guard.reads[0].startswith("nonzero() of mask (runtime/test_traced.py:")


@works_with(
    "Other calls than the plan's",
    "a bundle of a model that leaves padding out: another prompt length",
    "refused",
    "the error names the input that was read, and what it held",
)
def test_other_content_is_refused_by_name(folder: Path) -> None:
    bundle = ditfastattn.load(folder)
    message = (
        r"'mask', nonzero\(\) of mask \(runtime/test_traced\.py:\d+[\s\S]*which the model reads"
        r"[\s\S]*got: +\[False, False, True[\s\S]*expected: \[True, False, True"
        r"[\s\S]*export a bundle for this content"
    )
    with pytest.raises(ConfigError, match=message):
        bundle(**call_batch(2, TIMESTEPS[0], (4, 3)))


def test_other_content_in_the_middle_of_a_generation_is_refused(tmp_path: Path) -> None:
    model = handmade(Packed).build()
    call = call_batch(2, TIMESTEPS[0])
    plan = plan_for(model, call, *SHARED)
    export_model(model, RecordedCall(call), plan, tmp_path / "bundle", FIXED)
    bundle = ditfastattn.load(tmp_path / "bundle")
    bundle(**call)
    with pytest.raises(ConfigError, match="argument 'mask'"):
        bundle(**{**call_batch(2, TIMESTEPS[1], (4, 3)), "words": call["words"]})


def test_a_free_batch_is_refused(tmp_path: Path) -> None:
    call = RecordedCall(call_batch(2, TIMESTEPS[0]))
    with pytest.raises(ConfigError, match=r"'mask'[\s\S]*at one batch[\s\S]*--fixed-batch"):
        export_model(handmade(Packed).build(), call, None, tmp_path / "bundle")


@pytest.mark.parametrize(
    "content",
    [
        torch.tensor([True]),
        torch.tensor([[1.5, 1.5], [-2.0, 1.5]], dtype=torch.bfloat16),
        torch.arange(6).reshape(3, 2),
        torch.tensor(7),
    ],
)
def test_a_guard_keeps_content_exactly(content: Tensor) -> None:
    guard = guard_of("mask", content, ["item() of mask"])
    read: Any = type(guard).from_json(guard.model_dump(mode="json"), "here", "")
    torch.testing.assert_close(read.content(content), content, rtol=0, atol=0)


@pytest.mark.parametrize("content", [torch.arange(2**16 + 1), torch.tensor([1.0, -torch.inf])])
def test_content_that_a_manifest_cannot_hold_is_refused(content: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"'image'[\s\S]*a manifest cannot hold[\s\S]*accelerate"):
        guard_of("image", content, ["item() of image"])


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle with a loop that is said to read its labels."""
    tiny = tiny_dit()
    folder = bundle_with_loop(tmp_path_factory.mktemp("loop") / "bundle", tiny, fixed=True)
    labels = tiny.call(0, 4)["class_labels"]
    guard = guard_of("class_labels", labels, ["item() of class_labels (dit.py:1 in forward)"])
    read_manifest(folder).model_copy(update={"guards": (guard,)}).save(folder)
    return folder


def test_a_loop_refuses_other_content(loop: Path) -> None:
    bundle, labels = ditfastattn.load(loop), tiny_dit().call(0, 4)["class_labels"]
    found = bundle.generate(noise(1, 2, 4, 8, 8), class_labels=labels)
    assert found.shape == (2, 4, 8, 8)
    with pytest.raises(ConfigError, match="argument 'class_labels', item"):
        bundle.generate(noise(1, 2, 4, 8, 8), class_labels=labels + 1)


def test_triton_which_compares_nothing_gets_no_such_loop(loop: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"argument 'class_labels'[\s\S]*Triton does not compare"):
        export_triton(loop, tmp_path / "models")


def test_an_empty_value_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"words: [\s\S]*is empty[\s\S]*\[2, 0, 8\]"):
        spec(Value("words", (2, 0, 8), torch.float32))
