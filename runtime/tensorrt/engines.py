"""Describe the engines that were built from a bundle: ``engines.json`` beside them.

They lie in the bundle's folder ``engines``, in a folder named after their target.
"""

from __future__ import annotations

import hashlib
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, field_validator

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.files import open_regular, repr_path, write_text_atomically
from ditfastattn.core.records import Record
from ditfastattn.core.strict_json import read_json
from ditfastattn.runtime.bundle.specs import FileSpec, Natural, Positive, TensorSpec

ENGINES: Final = "engines.json"
ENGINES_FOLDER: Final = "engines"
SWITCH_FILE: Final = "switch.onnx"
_REMEDY: Final = "build them again (`ditfastattn build`)"


class Layout(StrEnum):
    """Name how a plan's step variants become engines."""

    AUTO = "auto"
    VARIANTS = "variants"  # one engine per distinct step
    SWITCH = "switch"  # one engine that holds all of them, the weights once
    LOOP = "loop"  # the whole generation as one engine


class PortSpec(Record, frozen=True):
    """Describe an input or output of a switch that cache slots go through."""

    name: str
    like: TensorSpec


class SwitchVariant(Record, frozen=True):
    """List the ports that a variant uses, in the order of its reads and writes."""

    reads: tuple[Natural, ...]
    writes: tuple[Natural, ...]


class SwitchSpec(Record, frozen=True):
    """Describe the graph that holds all variants.

    Attributes:
        variant: the input that selects the variant, an int32 without dimensions.
        inputs: of the model, in the graph's order.
        reads: the inputs for slots.
        writes: the outputs for slots.
        variants: which of these each variant uses.
    """

    variant: str
    inputs: tuple[str, ...]
    reads: tuple[PortSpec, ...]
    writes: tuple[PortSpec, ...]
    variants: tuple[SwitchVariant, ...]


class EngineSpec(Record, frozen=True):
    """Describe one engine.

    Attributes:
        file: its name.
        graph: the ONNX graph that it was built from.
        key: of all that it was built from; equal keys mean equal engines.
        content: size and hash of the file.
        seconds: duration of the build.
        attentions: how many the graph has.
        fused: how many kernels of the engine are a whole attention.
        findings: what a user should know from its log.
    """

    file: str
    graph: str
    key: str
    content: FileSpec
    seconds: float
    attentions: Natural
    fused: Natural
    findings: tuple[str, ...] = ()


class Engines(Record, frozen=True):
    """Describe the engines of one target.

    Attributes:
        schema_version: of this format.
        library: the module that built them, and runs them.
        version: of the library.
        target: the compute capability, or ``current``.
        device: the GPU of a ``current`` target.
        layout: which layout was built.
        reason: why that layout.
        rows: the least, usual and most rows of a call, both halves of guidance counted.
        manifest_sha256: of the bundle's manifest.
        engines: the engines, by the graph's name.
        switch: how the switch is used, if there is one.
    """

    schema_version: Literal[1] = 1
    library: str
    version: str
    target: str
    device: str = ""
    layout: Layout
    reason: str
    rows: tuple[Positive, Positive, Positive]
    manifest_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    engines: tuple[EngineSpec, ...] = ()
    switch: SwitchSpec | None = None

    @field_validator("engines")
    @classmethod
    def _inside(cls, engines: tuple[EngineSpec, ...]) -> tuple[EngineSpec, ...]:
        for spec in engines:
            if Path(spec.file).name != spec.file or not spec.file.isprintable():
                raise ValueError(f"{spec.file!r} is not a file name")
        return engines

    def of(self, graph: str) -> EngineSpec | None:
        """Return the engine that was built from ``graph``."""
        return next((spec for spec in self.engines if spec.graph == graph), None)

    def save(self, folder: Path) -> None:
        """Write ``engines.json``."""
        write_text_atomically(folder / ENGINES, self.model_dump_json(indent=1) + "\n")


def read_engines(folder: str | os.PathLike[str]) -> Engines:
    """Read ``engines.json`` in ``folder``.

    Raises:
        ConfigError: there is none, or it is not valid.
    """
    path = Path(folder) / ENGINES
    if not os.path.lexists(path):
        raise ConfigError("no engines were built here", where=repr_path(path), remedy=_REMEDY)
    return Engines.from_json(read_json(path, "the list of engines", _REMEDY), str(path), _REMEDY)


def read_engine(folder: Path, spec: EngineSpec) -> bytes:
    """Return the content of an engine, which is what was built.

    Raises:
        ConfigError: it is missing, or has changed.
    """
    path = folder / spec.file
    if path.is_symlink() or not path.is_file():
        raise ConfigError("the engine is missing", where=repr_path(path), remedy=_REMEDY)
    with open_regular(path, "cannot read the engine", _REMEDY) as file:
        content = file.read(spec.content.bytes + 1)
    if len(content) != spec.content.bytes or _hash(content) != spec.content.sha256:
        raise ConfigError(
            "the engine has changed since it was built", where=repr_path(path), remedy=_REMEDY
        )
    return content


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
