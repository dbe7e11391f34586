"""Check what is shipped: the wheel's content, its entry points, and how light an import is."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

import ditfastattn

ROOT = Path(__file__).resolve().parents[1]
FACADE = ROOT / "src" / "ditfastattn"
FOLDERS = ("export", "passes", "runtime", "serving", "tools")
BUILD_INPUTS = ("LICENSE", "pyproject.toml", "src", *FOLDERS)
ASSET_SUFFIXES = (".json", ".md", ".safetensors")
CONSOLE_SCRIPTS = {"ditfastattn": "ditfastattn.tools.commands.app:run"}
BACKENDS = {"ditfastattn": "ditfastattn.backend:ditfastattn"}
HEAVY = (
    "cache_dit",
    "diffusers",
    "fastapi",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "sklearn",
    "tensorrt",
    "tensorrt_rtx",
    "torchmetrics",
)


def _run_python(code: str, *arguments: str, cwd: Path) -> str:
    """Run ``code`` in a fresh interpreter and return what it printed last."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def _build(kind: str, source: Path, into: Path) -> Path:
    """Build a wheel or an sdist with the hook that installers call; no network is needed."""
    into.mkdir()
    code = f"import sys, setuptools.build_meta as b; print(b.build_{kind}(sys.argv[1]))"
    return into / _run_python(code, str(into), cwd=source)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of what the build reads, free of the leftovers of earlier builds."""
    copy = tmp_path_factory.mktemp("source")
    for name in BUILD_INPUTS:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy2(ROOT / name, copy / name)
    if (ROOT / "README.md").exists():
        shutil.copy2(ROOT / "README.md", copy / "README.md")
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build("wheel", source, tmp_path_factory.mktemp("wheel") / "dist")


def _packaged(wheel: Path) -> list[str]:
    """Return the files of ``wheel``, its own metadata left out, sorted, repeats kept."""
    with zipfile.ZipFile(wheel) as archive:
        return sorted(name for name in archive.namelist() if ".dist-info/" not in name)


def _expected() -> list[str]:
    """Return what the wheel must hold, by the real folders."""
    shipped = [path.relative_to(FACADE) for path in FACADE.glob("*.py")]
    shipped += [path.relative_to(FACADE) for path in (FACADE / "core").glob("*.py")]
    shipped.append(Path("py.typed"))
    for folder in FOLDERS:
        shipped += [path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py")]
    assets = (ROOT / "tools" / "assets").rglob("*")
    shipped += [path.relative_to(ROOT) for path in assets if path.suffix in ASSET_SUFFIXES]
    return sorted(f"ditfastattn/{path.as_posix()}" for path in shipped)


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert ditfastattn.__version__ == project["version"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_links_are_relative_and_resolve(folder: str) -> None:
    link = FACADE / folder
    assert link.is_symlink()
    assert os.readlink(link) == f"../../{folder}"
    assert link.resolve() == ROOT / folder
    assert (link / "__init__.py").is_file()


def test_the_wheel_holds_each_file_of_the_folders_once(wheel: Path) -> None:
    assert _packaged(wheel) == _expected()


def test_the_wheel_built_from_the_sdist_is_the_same(
    source: Path, wheel: Path, tmp_path: Path
) -> None:
    sdist = _build("sdist", source, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert _packaged(_build("wheel", unpacked, tmp_path / "dist")) == _packaged(wheel)


def test_the_wheel_declares_its_entry_points(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        declared = configparser.ConfigParser()
        declared.read_string(archive.read(name).decode())
    assert dict(declared["console_scripts"]) == CONSOLE_SCRIPTS
    assert dict(declared["torch_dynamo_backends"]) == BACKENDS


@pytest.mark.parametrize("target", [*CONSOLE_SCRIPTS.values(), *BACKENDS.values()])
def test_entry_points_name_packaged_modules(wheel: Path, target: str) -> None:
    module, _, _ = target.partition(":")
    assert module.replace(".", "/") + ".py" in _packaged(wheel)


def test_the_wheel_carries_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/licenses/LICENSE"))
        assert archive.read(name) == (ROOT / "LICENSE").read_bytes()


def test_importing_loads_nothing_heavy_and_leaves_cuda_alone(tmp_path: Path) -> None:
    code = """
import importlib, json, sys, torch

def refuse(*_):
    raise AssertionError("the import initialised CUDA")

torch.cuda._lazy_init = refuse
loaded = {}
for module in sys.argv[1:]:
    importlib.import_module(module)
    assert not torch.cuda.is_initialized()
    loaded[module] = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps(loaded))
"""
    modules = ("ditfastattn", "ditfastattn.backend", "ditfastattn.tools.commands.app")
    loaded = json.loads(_run_python(code, *modules, cwd=tmp_path))
    assert tuple(loaded) == modules
    for module, names in loaded.items():  # of it and of those before it
        assert "ditfastattn" in names
        assert [name for name in HEAVY if name in names] == [], module


def test_torch_finds_the_backend_by_name(tmp_path: Path) -> None:
    assert "ditfastattn" in torch.compiler.list_backends(exclude_tags=())
    code = """
from torch._dynamo.backends.registry import lookup_backend

found = lookup_backend("ditfastattn")
print(f"{found.__module__}:{found.__qualname__}")
"""
    assert _run_python(code, cwd=tmp_path) == BACKENDS["ditfastattn"]
