"""An export that was interrupted resumes with what is sound, and makes the bundle it would have."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from ditfastattn import ConfigError, Strategy, load
from ditfastattn.export import graph_files, step_graphs
from ditfastattn.runtime.bundle.manifest import read_manifest
from tests.export.helpers import export_anew, export_tiny
from tests.helpers import (
    capture_every_site,
    largest_difference,
    mixed_strategies,
    tiny_dit,
    uniform_strategies,
)

Rows = list[tuple[Strategy, ...]]


def interrupt_before(name: str, rows: Rows, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Export until the graph ``name`` is to be written."""
    write = step_graphs.write_graph

    def stopping(graph: Any, weights: Any, label: str, about: Any) -> Any:
        if label == name:
            raise KeyboardInterrupt
        return write(graph, weights, label, about)

    with monkeypatch.context() as patch:
        patch.setattr(graph_files, "write_graph", stopping)
        with pytest.raises(KeyboardInterrupt):
            export_anew(tiny_dit(), rows, out)


def mixed_rows() -> Rows:
    return [tuple(row) for row in mixed_strategies(capture_every_site(tiny_dit())[1], seed=5)]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"request": 1}', '{"a": ' * 10**5, "\ud800", "\x00"]
)
def test_a_damaged_record_of_the_state_is_no_obstacle(
    content: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tiny, rows = tiny_dit(), mixed_rows()
    whole = export_tiny(tiny, rows, tmp_path / "whole")
    interrupt_before("variant_01", rows, tmp_path / "bundle", monkeypatch)
    state = tmp_path / ".bundle.partial" / "partial.json"
    state.write_bytes(content.encode(errors="surrogatepass"))
    assert export_anew(tiny, rows, tmp_path / "bundle").files == whole.files
    assert "cannot resume" in caplog.text


def test_a_changed_record_of_the_state_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, rows = tiny_dit(), mixed_rows()
    whole = export_tiny(tiny, rows, tmp_path / "whole")
    interrupt_before("variant_01", rows, tmp_path / "bundle", monkeypatch)
    state = tmp_path / ".bundle.partial" / "partial.json"
    text = state.read_text()
    assert "4096" in text  # where a tensor lies
    state.write_text(text.replace("4096", "8192"))
    assert export_anew(tiny, rows, tmp_path / "bundle").files == whole.files


@pytest.mark.parametrize("name", ["weights.bin", "variant_00.onnx"])
def test_a_changed_bit_in_what_was_written_is_noticed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, rows = tiny_dit(), mixed_rows()
    whole = export_tiny(tiny, rows, tmp_path / "whole")
    interrupt_before("variant_01", rows, tmp_path / "bundle", monkeypatch)
    path = tmp_path / ".bundle.partial" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert export_anew(tiny, rows, tmp_path / "bundle").files == whole.files


def test_a_full_disk_is_named_and_the_export_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each write, one after another; the bundle that was there stays until the end."""
    tiny, rows = tiny_dit(), uniform_strategies(capture_every_site(tiny_dit())[1], Strategy.WINDOW)
    export_tiny(tiny, None, tmp_path / "bundle")
    before = tiny.run(load(tmp_path / "bundle"))
    whole = export_tiny(tiny, rows, tmp_path / "whole")
    sync, said = os.fsync, list[str]()
    for limit in range(99):
        calls = iter(range(999))

        def failing(handle: int, limit: int = limit, calls: Any = calls) -> None:
            if next(calls) == limit:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing)
            try:
                export_anew(tiny, rows, tmp_path / "bundle")
                break
            except ConfigError as error:
                said.append(str(error))
        if load(tmp_path / "bundle").manifest.files != whole.files:
            assert largest_difference(tiny.run(load(tmp_path / "bundle")), before) == 0.0
    assert 5 < len(said) < 98
    assert all("No space left" in text and str(tmp_path) in text for text in said)
    assert read_manifest(tmp_path / "bundle").files == whole.files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "whole"]
