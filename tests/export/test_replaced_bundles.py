"""What is run is what was checked, whatever another process does to the bundle meanwhile."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ditfastattn import CfgLayout, ConfigError, Strategy, load
from ditfastattn.core.files import open_regular
from ditfastattn.export.bundle import export_model
from ditfastattn.export.capture_call import RecordedCall
from ditfastattn.export.options import ExportOptions
from ditfastattn.runtime.bundle import files
from ditfastattn.runtime.bundle.onnx_graph import import_onnxruntime
from tests.export.helpers import ddim_stepping, export_once, export_tiny
from tests.helpers import (
    capture_every_site,
    largest_difference,
    make_plan,
    tiny_dit,
    uniform_strategies,
)

Replace = Callable[[Path, Path], None]


def by_renames(new: Path, bundle: Path) -> None:
    bundle.rename(bundle.with_name("old"))
    new.rename(bundle)
    shutil.rmtree(bundle.with_name("old"))


def file_by_file(new: Path, bundle: Path) -> None:
    for path in new.iterdir():
        path.replace(bundle / path.name)


def two_bundles(folder: Path) -> tuple[Path, Path]:
    """Export two models of equal structure and other weights."""
    made = []
    for seed in (0, 1):
        tiny = tiny_dit(seed)
        _, sites = capture_every_site(tiny)
        made.append(folder / f"bundle-{seed}")
        export_tiny(tiny, uniform_strategies(sites, Strategy.SHARE_STEP), made[-1])
    return made[0], made[1]


def before_session(number: int, act: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Let ``act`` happen before session ``number`` of ONNX Runtime is opened."""
    runtime: Any = import_onnxruntime()
    opened, count = runtime.InferenceSession, iter(range(99))

    def opening(*args: Any, **kwargs: Any) -> Any:
        if next(count) == number:
            act()
        return opened(*args, **kwargs)

    patch.setattr(runtime, "InferenceSession", opening)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("replace", [by_renames, file_by_file])
def test_a_bundle_replaced_while_it_is_loaded_is_the_one_that_was_checked(
    number: int, replace: Replace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two_bundles(tmp_path)
    tiny = tiny_dit()
    expected = tiny.run(load(first))
    before_session(number, lambda: replace(second, first), monkeypatch)
    assert largest_difference(tiny.run(load(first)), expected) == 0.0


def test_a_loop_opened_after_the_bundle_was_replaced_is_the_one_that_was_checked(
    tmp_path: Path,
) -> None:
    made = []
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for seed in (0, 1):
        tiny = tiny_dit(seed)
        rows = uniform_strategies(capture_every_site(tiny)[1], Strategy.SHARE_STEP)
        plan = make_plan(tiny, rows, CfgLayout.COND_FIRST, feed_forwards=True)
        stepping = ddim_stepping(tiny, plan)
        made.append(tmp_path / str(seed))
        export_once(tiny, plan, made[-1], ExportOptions(loop=True), stepping)
    classes = tiny_dit().call(0, 4)["class_labels"]
    expected = load(made[0]).generate(noise, class_labels=classes)
    loaded = load(made[0])
    by_renames(made[1], made[0])
    assert torch.equal(loaded.generate(noise, class_labels=classes), expected)


def test_a_file_written_in_place_while_it_is_loaded_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two_bundles(tmp_path)
    content = (second / "weights.bin").read_bytes()

    def write() -> None:
        (first / "weights.bin").write_bytes(content)

    before_session(1, write, monkeypatch)
    with pytest.raises(ConfigError, match=r"weights\.bin: the file was changed(.|\n)*remedy"):
        load(first)


def test_a_bundle_replaced_while_its_files_are_opened_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest of one and the files of another do not match: the reader starts anew."""
    first, second = two_bundles(tmp_path)
    tiny = tiny_dit()
    expected = tiny.run(load(second))
    opened = open_regular
    calls: list[Path] = []

    def opening(path: Path, *args: Any) -> Any:
        calls.append(path)
        if len(calls) == 2:
            by_renames(second, first)
        return opened(path, *args)

    monkeypatch.setattr(files, "open_regular", opening)
    assert largest_difference(tiny.run(load(first)), expected) == 0.0


def test_temporary_files_are_not_part_of_a_bundle(tmp_path: Path) -> None:
    """Such as a killed export has left in the folder that this one resumes in."""
    folder = tmp_path / ".bundle.partial"
    tiny = tiny_dit()
    _, sites = capture_every_site(tiny)
    rows = uniform_strategies(sites, Strategy.SHARE_STEP)
    plan = make_plan(tiny, rows, CfgLayout.COND_FIRST, feed_forwards=True)
    left: list[str] = []

    def leave(file: str, *_: object) -> None:
        left.append(f".{file}.abcdefgh.tmp")
        (folder / left[-1]).write_text("half")

    options = ExportOptions(on_progress=leave)
    call = RecordedCall(tiny.call(0, 4))
    manifest = export_model(tiny.model, call, plan, tmp_path / "bundle", options)
    assert left
    assert {path.name for path in (tmp_path / "bundle").iterdir()} == {
        *manifest.files,
        "manifest.json",
    }
    assert not {*left} & {*manifest.files}
