"""Images of many prompts as files, and a record of what each was made by; it can be resumed."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.files import (
    make_folder,
    naming_faults,
    write_bytes_atomically,
    write_text_atomically,
)
from ditfastattn.core.locks import sole_writer
from ditfastattn.core.records import Record
from ditfastattn.core.strict_json import parse_json, read_text
from ditfastattn.serving.images import ImageServer
from ditfastattn.serving.job import Job, Kind, Made, Wanted
from ditfastattn.serving.pipeline import NotFiniteError

log = logging.getLogger(__name__)

RECORD: Final = "images.jsonl"
_LOCK: Final = ".images.lock"
_MOST_BYTES: Final = 2**32  # of the record: some ten million images


class Recorded(Record, frozen=True):
    """Hold what one image was asked for by, and what ran it."""

    index: int
    file: str
    condition: str | int
    negative: str
    seed: int
    tier: str
    steps: int
    guidance: float | None
    height: int
    width: int
    plan: str  # "dense" if none ran
    reason: str  # why none ran that the tier has
    seconds: float  # that its batch took

    @property
    def wanted(self) -> Wanted:
        """Return the image that was asked for."""
        kind = Kind(self.tier, self.steps, self.guidance, self.height, self.width)
        return Wanted(kind, self.condition, self.seed, self.negative)


def write_images(
    server: ImageServer,
    wanted: Sequence[Wanted],
    folder: Path,
    on_progress: Callable[[int], object] = lambda _done: None,
    part: range | None = None,
) -> list[int]:
    """Write image k of ``wanted``, which are of one kind, to ``folder``/k.png, and the record.

    An image is there once its line is in the record; its file is written before. What an earlier
    call has made is kept.

    Args:
        server: makes the images; as many at a time as its limits say.
        wanted: the images.
        folder: made if it is not there.
        on_progress: called with the number of images that are done.
        part: the indices of those to make; all where None.

    Returns:
        The indices of images with NaN or infinities, which are not written.

    Raises:
        ConfigError: the folder holds other images, another process writes there, or no plan
            is for these and that is an error.
        FileError: a file cannot be written.
    """
    make_folder(folder)
    busy = "another process writes images to the folder"
    with sole_writer(folder / _LOCK, folder, busy, "choose another folder", remove=True):
        done = _recorded(folder, wanted)
        own = range(len(wanted)) if part is None else part
        left = [index for index in own if index not in done]
        broken: list[int] = []
        before = len(own) - len(left)
        on_progress(before)
        for first in range(0, len(left), server.limits.batch):
            indices = left[first : first + server.limits.batch]
            try:
                made = server.generate([Job(wanted[index], math.inf) for index in indices])
            except NotFiniteError as error:
                log.warning("ditfastattn: images %s are not written: %s", indices, error)
                broken += indices
            else:
                _write(folder, [(index, wanted[index]) for index in indices], made)
            on_progress(before + first + len(indices) - len(broken))
    return broken


def file_of(index: int) -> str:
    """Return the name of an image's file."""
    return f"{index:08}.png"


def _write(folder: Path, indexed: Sequence[tuple[int, Wanted]], made: Sequence[Made]) -> None:
    lines = []
    for (index, wanted), image in zip(indexed, made, strict=True):
        write_bytes_atomically(folder / file_of(index), image.png)
        lines.append(_line(index, wanted, image).model_dump_json() + "\n")
    path = folder / RECORD
    with naming_faults(path), path.open("a", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


def _line(index: int, wanted: Wanted, made: Made) -> Recorded:
    kind = wanted.kind
    return Recorded(
        index=index,
        file=file_of(index),
        condition=wanted.condition,
        negative=wanted.negative,
        seed=wanted.seed,
        tier=kind.tier,
        steps=kind.steps,
        guidance=kind.guidance,
        height=kind.height,
        width=kind.width,
        plan=made.choice.name or "dense",
        reason=made.choice.reason,
        seconds=round(made.seconds, 4),
    )


def _recorded(folder: Path, wanted: Sequence[Wanted]) -> dict[int, Recorded]:
    """Return the images that are there, by index; a line that was cut is removed."""
    path = folder / RECORD
    if not path.exists():
        return {}
    text = read_text(path, "the record of images", most_bytes=_MOST_BYTES)
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text_atomically(path, whole)
    found: dict[int, Recorded] = {}
    remedy = "choose another folder, or remove what is in this one"
    for number, line in enumerate(whole.splitlines(), 1):
        where = f"{path}:{number}"
        data = parse_json(line, where, "a line of the record", remedy)
        made = Recorded.from_json(data, where, remedy)
        asked = wanted[made.index] if 0 <= made.index < len(wanted) else None
        if made.wanted != asked:
            raise ConfigError(
                "the folder holds images of other prompts or settings",
                where=where,
                got=made.wanted,
                expected=asked or f"{len(wanted)} images",
                remedy=remedy,
            )
        if (folder / file_of(made.index)).exists():
            found[made.index] = made
    return found
