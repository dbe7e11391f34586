"""The doctor says what is there, why something cannot be used, and the remedy."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from ditfastattn import ConfigError
from ditfastattn.tools.commands import app as cli
from ditfastattn.tools.commands import doctor as doctor_command
from ditfastattn.tools.commands.doctor import Finding, examine


def found(name: str) -> Finding:
    return next(item for item in examine() if item.name == name)


def pretend(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    monkeypatch.setattr(doctor_command, "_version", lambda name: versions.get(name, ""))


def test_what_is_installed_here_is_reported() -> None:
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 0
    assert "torch" in result.output
    assert "CPU" in found("onnxruntime").can
    assert all(item.can or item.cannot for item in examine())
    assert all(item.remedy for item in examine() if item.cannot == "not installed")


def test_a_missing_runtime_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {})
    assert found("onnxruntime").cannot == "not installed"
    assert "ditfastattn[onnx]" in found("onnxruntime").remedy
    assert found("tensorrt-rtx").remedy == 'pip install "ditfastattn[tensorrt-rtx]"'


def test_two_onnxruntimes_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"onnxruntime": "1.0", "onnxruntime-gpu": "1.0"})
    assert "overwrite each other" in found("onnxruntime").cannot


def test_a_library_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"tensorrt-rtx": "1.0"})

    def fail(name: str) -> None:
        raise ConfigError("TensorRT does not load") from OSError("libx is missing")

    monkeypatch.setattr(doctor_command, "find_library", fail)
    assert found("tensorrt-rtx").cannot == "libx is missing"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_tensorrt_can_do_without_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert "sm89" in found("tensorrt-rtx").can
    assert "cannot run here" in found("tensorrt-rtx").cannot


@pytest.mark.parametrize(
    ("capability", "cannot"), [((8, 9), ""), ((9, 0), "this GPU, sm90, is not among them")]
)
def test_a_gpu_that_tensorrt_does_not_list_is_told(
    capability: tuple[int, int], cannot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    pretend(monkeypatch, {"tensorrt-rtx": "1.0"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    finding = doctor_command._tensorrt("tensorrt_rtx", "tensorrt-rtx")
    assert finding.cannot == cannot
    assert "build engines" in finding.can


def test_no_compiler_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "torch.compile" in found("C++ compiler").remedy
