"""Write a bundle's loop into a model repository of Triton Inference Server.

A model is a folder with a configuration and numbered versions. Triton serves the highest version,
and may look at any time: each folder appears by one rename, when it is complete.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import onnx

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.files import make_folder, naming_faults, replacing, write_text_atomically
from ditfastattn.core.locks import sole_writer
from ditfastattn.export.lint import lint
from ditfastattn.export.triton.config import (
    CONFIG_FILE,
    config_of,
    read_config,
    text_of,
)
from ditfastattn.export.triton.graph import graph_of, ports_of
from ditfastattn.export.triton.options import Backend, TritonOptions, check_repository
from ditfastattn.runtime.bundle.files import OpenBundle, open_bundle
from ditfastattn.runtime.bundle.specs import LoopSpec

log = logging.getLogger(__name__)

MODEL_FILE: Final = "model.onnx"
_FIXED: Final = ("backend", "max_batch_size", "input", "output")  # what a client relies on


def write_repository(
    folder: str | os.PathLike[str],
    repository: str | os.PathLike[str],
    options: TritonOptions | None = None,
) -> Path:
    """Write the loop of the bundle in ``folder`` as a model of ``repository``; return its version.

    Where the model exists, this is a new version of it, which Triton serves instead of the older
    ones. Its configuration stays as it is.

    Raises:
        ConfigError: the bundle has no loop, or the model in the repository takes something else.
    """
    chosen = options or TritonOptions()
    name = check_repository(folder, repository, chosen.name)
    opened = open_bundle(folder)
    loop = opened.manifest.loop
    if loop is None:
        raise ConfigError(
            "the bundle has no unrolled loop, which is what Triton runs",
            where=str(opened.root),
            remedy="export it with --loop (loop=True); where the sampler has none, serve the "
            "bundle by `ditfastattn serve`",
        )
    for guard in opened.manifest.guards:
        raise ConfigError(
            "the loop holds for one content of an argument, which Triton does not compare",
            where=f"{opened.root}: argument {guard.name!r}",
            got=guard.reads[0],
            remedy="serve the bundle by `ditfastattn serve`, which compares it",
        )
    ports = ports_of(opened.manifest, loop)
    config = config_of(name, ports, opened.manifest, chosen)
    if not ports.joinable:
        log.warning(
            "%s: requests are not joined: the batch is fixed, or a condition is of all images",
            opened.root,
        )
    root = Path(os.path.abspath(repository))
    with _sole_writer(root, name) as partial:
        model = root / name
        if model.exists():
            _check_same(read_config(model / CONFIG_FILE), config, model / CONFIG_FILE)
            version = model / str(1 + max(_versions(model), default=0))
            _write_version(opened, loop, partial, chosen)
            with naming_faults(version):
                os.rename(partial, version)
        else:
            version = model / "1"
            _write_version(opened, loop, partial / "1", chosen)
            write_text_atomically(partial / CONFIG_FILE, text_of(config))
            with naming_faults(model):
                os.rename(partial, model)
    return version


@contextmanager
def _sole_writer(root: Path, name: str) -> Generator[Path]:
    """Yield an absent folder beside the repository, in which Triton does not look."""
    make_folder(root)
    lock, partial = (root.parent / f".{root.name}.{name}.{kind}" for kind in ("lock", "partial"))
    what, remedy = "another export is writing this model", "wait for it, or name another model"
    with sole_writer(lock, root / name, what, remedy, remove=True):
        shutil.rmtree(partial, ignore_errors=True)  # what a killed export has left
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _write_version(
    opened: OpenBundle, loop: LoopSpec, version: Path, options: TritonOptions
) -> None:
    manifest = opened.manifest
    make_folder(version)
    with replacing(version / manifest.weights) as weights:
        shutil.copyfile(opened.opened(manifest.weights), weights)
    model = onnx.load_from_string(bytes(opened.content(loop.file)))
    with replacing(version / MODEL_FILE) as path:
        path.write_bytes(graph_of(model, manifest, loop).SerializeToString())
    lint(version / MODEL_FILE)
    if options.backend is Backend.PYTHON:
        text = Path(__file__).with_name("python_model.py").read_text(encoding="utf-8")
        write_text_atomically(version / "model.py", text)
    opened.check_unchanged()


def _versions(model: Path) -> list[int]:
    return [int(path.name) for path in model.iterdir() if re.fullmatch("[1-9][0-9]*", path.name)]


def _check_same(found: Any, wanted: Any, path: Path) -> None:
    """Refuse a model whose clients would get something else; other entries are the operator's."""
    for field in _FIXED:
        got, expected = (str(getattr(config, field)).strip() for config in (found, wanted))
        if got != expected:
            raise ConfigError(
                "the model in the repository is another one",
                where=f"{path}: {field}",
                got=got,
                expected=expected,
                remedy="give this one another name, or remove that model",
            )
