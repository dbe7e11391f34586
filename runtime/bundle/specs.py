"""Define the entries of a bundle's manifest: tensors, cache slots, graphs, files, the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import AfterValidator, Field, FiniteFloat, model_validator

from ditfastattn.core.records import Record
from ditfastattn.passes.analysis.fingerprint import Fingerprint
from ditfastattn.passes.graph.slots import parse_slot
from ditfastattn.runtime.bundle.settings import Settings

BATCH = "batch"  # the name of that dimension in the graphs
SECOND_CALL = "second"  # a loop's conditions of each step's second call: ``second.NAME``

Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]

Dtype = Literal[
    "float32", "float16", "bfloat16", "float64", "uint8", "int8", "int16", "int32", "int64", "bool"
]


ELEMENT_TYPES: Final[Mapping[torch.dtype, int]] = {  # of onnx.TensorProto
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int16: 5,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}
ITEM_BYTES: Final = {number: dtype.itemsize for dtype, number in ELEMENT_TYPES.items()}


def _slot_name(text: str) -> str:
    parse_slot(text)
    return text


SlotName = Annotated[str, AfterValidator(_slot_name)]


class Multiple(Record, frozen=True):
    """Stand for a size that is ``numerator / denominator`` times the batch."""

    numerator: Positive
    denominator: Positive

    def of(self, batch: int) -> int:
        """Return the size at ``batch``; ``ValueError`` if it is not a whole number."""
        size = Fraction(self.numerator, self.denominator) * batch
        if size.denominator != 1:
            raise ValueError(f"a batch of {batch} is not a multiple of {size.denominator}")
        return int(size)

    def name(self, batch: str = BATCH) -> str:
        """Return the name of this dimension in the graphs."""
        times = batch if self.numerator == 1 else f"{self.numerator}*{batch}"
        return times if self.denominator == 1 else f"{times}/{self.denominator}"


class TensorSpec(Record, frozen=True):
    """Describe a tensor: ``name`` in the graphs, shape, dtype as torch names it.

    Where ``pairs``, the model's argument is complex; the graphs take its real and imaginary parts,
    which lie side by side in the last dimension.
    """

    name: str
    shape: tuple[Positive | Multiple, ...]
    dtype: Dtype
    pairs: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """Return the dtype itself."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def sizes(self, batch: int) -> tuple[int, ...]:
        """Return the shape at ``batch``."""
        return tuple(size if isinstance(size, int) else size.of(batch) for size in self.shape)

    @property
    def dims(self) -> tuple[int | str, ...]:
        """Return the shape as the graphs have it."""
        return tuple(size if isinstance(size, int) else size.name() for size in self.shape)


class SlotSpec(TensorSpec, frozen=True):
    """Describe a cache slot: ``lives`` holds pairs (step that writes, last step that reads).

    A slot that has a ``source`` takes over what that one held when a step replaces it. What the
    second of two calls takes over from the first is as if the step before had written it, which
    is -1 at the first step.
    """

    lives: tuple[tuple[Annotated[int, Field(ge=-1)], Natural], ...]
    source: str = ""

    @model_validator(mode="after")
    def _check(self) -> SlotSpec:
        expected = str(parse_slot(self.name).source or "")
        if self.source != expected:
            raise ValueError(f"slots: {self.name!r} takes over {expected!r}, not {self.source!r}")
        return self


class CallSchedule(Record, frozen=True):
    """Describe what one of a step's calls of the model does, step by step.

    Attributes:
        schedule: the variant of each step; null at a step without this call, the second one where
            guidance is off.
        slots: its caches.
        factors: the numbers that each step combines earlier outputs with, by slot.
        adopted: the slots that it takes over, before each step, from what the step's first call
            has written.
    """

    schedule: tuple[Natural | None, ...]
    slots: tuple[SlotSpec, ...]
    factors: tuple[dict[SlotName, FiniteFloat], ...]
    adopted: tuple[tuple[SlotName, ...], ...]


class GraphSize(Record, frozen=True):
    """Describe how large a graph is.

    Attributes:
        nodes: how many nodes it has.
        largest: the bytes of the largest value that it computes, at the least batch.
        unknown: how many values have a size that only running the graph shows.
    """

    nodes: Natural
    largest: Natural
    unknown: Natural = 0

    def exceeds(self, other: GraphSize) -> bool:
        """Return whether the values ask for more than those of ``other``."""
        return self.largest > other.largest or self.unknown > other.unknown


class VariantSpec(Record, frozen=True):
    """Describe one graph: the inputs of the model and slots it reads, the slots it writes.

    ``reads`` and ``writes`` pair a slot with the name of the graph's input or output.
    """

    file: str
    size: GraphSize
    inputs: tuple[str, ...]
    reads: tuple[tuple[SlotName, str], ...]
    writes: tuple[tuple[SlotName, str], ...]

    @property
    def graph_inputs(self) -> tuple[str, ...]:
        """Return the names of the graph's inputs, in order."""
        return (*self.inputs, *(name for _, name in self.reads))


class FileSpec(Record, frozen=True):
    """Record a file's content."""

    bytes: Natural
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ModelSpec(Record, frozen=True):
    """Describe the transformer that a bundle stands in for."""

    class_name: str
    parameters: tuple[str, ...]  # of its ``forward``, in order
    config: dict[str, Any]
    fingerprint: Fingerprint
    dtype: Dtype
    settings: Settings | None = None  # what it is called with beside tensors, defaults included


def public_config(model: Any) -> dict[str, Any]:
    """Return a model's configuration as JSON would read it back, private entries left out."""
    public = {k: v for k, v in dict(getattr(model, "config", {})).items() if not k.startswith("_")}
    config: dict[str, Any] = json.loads(json.dumps(public, default=str))
    return config


class LoopSpec(Record, frozen=True):
    """Describe the unrolled sampler: noise and conditions in, latents out.

    The graph multiplies standard normal noise by ``noise_scale``, as the pipeline would.
    """

    file: str
    size: GraphSize
    noise: TensorSpec
    noise_scale: float
    conditions: tuple[TensorSpec, ...]
    latents: str
    guidance_scale: float

    @property
    def graph_inputs(self) -> tuple[str, ...]:
        """Return the names of the graph's inputs, in order."""
        return (self.noise.name, *(spec.name for spec in self.conditions))
