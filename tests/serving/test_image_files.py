"""Images of many prompts as files: `ditfastattn generate`, and what interrupts it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ditfastattn
from ditfastattn import ConfigError, Plan
from ditfastattn.core.errors import FileError
from ditfastattn.core.locks import sole_writer
from ditfastattn.serving.image_files import RECORD, write_images
from ditfastattn.serving.images import ImageServer
from ditfastattn.serving.job import Job, Made, Wanted
from ditfastattn.serving.limits import Limits
from ditfastattn.serving.request import ImageRequest
from ditfastattn.tools.faults.inject import Disk, in_child
from tests.helpers import attentive_pipeline
from tests.serving.servers import ASK, alone
from tests.shell import exit_code
from tests.three_steps import CALL
from tests.tiers import slow_but
from tests.works_with import works_with

COUNT = 2


def server_of(book: Path, pipeline: Any = None) -> ImageServer:
    torch._dynamo.reset()
    opened, limits = ditfastattn.book(book), Limits(batch=1)
    return ImageServer(pipeline or attentive_pipeline(), opened, limits=limits, lowering="eager")


def wanted_of(server: ImageServer, **changes: Any) -> list[Wanted]:
    body = ImageRequest.model_validate(ASK | {"n": COUNT} | changes)
    return server.wanted(body)


def pixels(folder: Path, index: int) -> Any:
    return np.asarray(Image.open(folder / f"{index:08}.png"), dtype=np.int64)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / RECORD).read_text().splitlines()]


def assert_whole(folder: Path, plan: Plan) -> None:
    assert sorted(line["index"] for line in lines_of(folder)) == list(range(COUNT))
    for index in range(COUNT):
        wanted = alone(attentive_pipeline(), plan, CALL, ASK["seed"] + index)
        assert np.array_equal(pixels(folder, index), wanted)
    names = {path.name for path in folder.iterdir()}
    assert names == {RECORD, *(f"{index:08}.png" for index in range(COUNT))}


class Replayed(ImageServer):
    """What hands out images that were made before, by their seeds."""

    def __init__(self, made: dict[int, Made]) -> None:
        self.limits, self._made = Limits(), made

    def generate(self, jobs: Sequence[Job]) -> list[Made]:
        return [self._made[job.wanted.seed] for job in jobs]


@works_with(
    "Serving",
    "`ditfastattn generate BOOK --prompts FILE`, killed or out of disk space at any write",
    "works",
    "another start makes what is missing; each image is that of its seed alone, bit for bit",
)
@pytest.mark.parametrize(
    "full", slow_but([False], [False, True]), ids=["killed", "the disk is full"]
)
def test_what_fails_at_any_write_is_continued(
    book_folder: Path, plans: dict[str, Plan], tmp_path: Path, full: bool
) -> None:
    server = server_of(book_folder)
    wanted = wanted_of(server)
    made = {each.seed: server.generate([Job(each, math.inf)])[0] for each in wanted}
    replayed, folder = Replayed(made), tmp_path / "images"
    at, over = 0, False
    while not over:
        shutil.rmtree(folder, ignore_errors=True)
        code = in_child(partial(_fail, replayed, wanted, folder, at, full))
        assert code in (0, FAILED, -signal.SIGKILL)
        over = code == 0
        assert write_images(replayed, wanted, folder) == []
        assert_whole(folder, plans["high"])
        at += 1
    assert at > 6


FAILED = 3


def _fail(server: ImageServer, wanted: Sequence[Wanted], folder: Path, at: int, full: bool) -> None:
    disk = Disk()
    try:
        with disk.failing(folder, at, full):
            write_images(server, wanted, folder)
    except FileError:
        os._exit(FAILED)
    if disk.reached:
        os._exit(FAILED)


def test_a_line_that_was_cut_is_made_again(
    book_folder: Path, plans: dict[str, Plan], tmp_path: Path
) -> None:
    server = server_of(book_folder)
    wanted = wanted_of(server)
    assert write_images(server, wanted, tmp_path) == []
    record = tmp_path / RECORD
    record.write_text(record.read_text()[:-20])
    (tmp_path / "00000000.png").unlink()
    done: list[int] = []
    assert write_images(server, wanted, tmp_path, done.append) == []
    assert done == [0, 1, 2]
    assert {line["index"] for line in lines_of(tmp_path)} == {0, 1}
    names = {line["plan"] for line in lines_of(tmp_path)}
    assert names == {server.book.plans[0][0].name}  # type: ignore[union-attr]  # it has a book


def test_images_of_other_settings_are_not_mixed(book_folder: Path, tmp_path: Path) -> None:
    server = server_of(book_folder)
    wanted = wanted_of(server)
    write_images(server, wanted[:1], tmp_path)
    for other in (wanted[1:], wanted_of(server, quality="medium"), wanted_of(server, prompt="2")):
        with pytest.raises(ConfigError, match=r"images.jsonl:1: the folder holds images of other"):
            write_images(server, other, tmp_path)
    with (
        pytest.raises(ConfigError, match="another process writes"),
        sole_writer(tmp_path / ".images.lock", tmp_path, "busy"),
    ):
        write_images(server, wanted, tmp_path)
    assert len(lines_of(tmp_path)) == 1


def test_an_image_that_is_not_finite_is_not_written(book_folder: Path, tmp_path: Path) -> None:
    pipeline = attentive_pipeline()
    own, calls = pipeline.scheduler.step, [0]

    def step(*args: Any, **kwargs: Any) -> Any:
        result = own(*args, **kwargs)
        calls[0] += 1
        if calls[0] == 3:  # the last step of the first image
            result.prev_sample[0, 0, 0, 0] = math.nan
        return result

    pipeline.scheduler.step = step
    server = server_of(book_folder, pipeline)
    wanted = wanted_of(server)
    assert write_images(server, wanted, tmp_path) == [0]
    assert [line["index"] for line in lines_of(tmp_path)] == [1]
    assert write_images(server, wanted, tmp_path) == []
    assert [line["index"] for line in lines_of(tmp_path)] == [1, 0]


def test_parts_are_joined_to_the_whole(
    book_folder: Path, plans: dict[str, Plan], tmp_path: Path
) -> None:
    server = server_of(book_folder)
    wanted, whole = wanted_of(server), tmp_path / "whole"
    whole.mkdir()
    done: list[int] = []
    for part in range(COUNT):
        folder = tmp_path / f"part-{part}"
        assert write_images(server, wanted, folder, done.append, range(part, COUNT, COUNT)) == []
        assert [line["index"] for line in lines_of(folder)] == [part]
        shutil.copy(folder / f"{part:08}.png", whole)
        with (whole / RECORD).open("a") as joined:
            joined.write((folder / RECORD).read_text())
    assert done == [0, 1, 0, 1]
    assert write_images(Replayed({}), wanted, whole) == []  # nothing is left to make
    assert_whole(whole, plans["high"])


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    return exit_code(monkeypatch, "generate", *arguments)


def test_the_command_makes_an_image_of_each_line(
    book_folder: Path,
    plans: dict[str, Plan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch._dynamo.reset()
    pipeline: Any = attentive_pipeline()
    pipeline.save_pretrained(tmp_path / "pipeline")
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("1\n\n 1 \n")
    given: list[object] = [book_folder, "--prompts", prompts, "--out", out, "--lowering", "eager"]
    given += ["--pipeline", tmp_path / "pipeline", "--guidance", "2.0"]
    for reason, more in {
        r"prompt 0: quality: no such quality": ("--quality", "best"),
        r"prompt 0: size: String should match": ("--size", "large"),
        r"sampler.steps": ("--steps", "5", "--on-mismatch", "error"),
        r"--part: not a part[\s\S]*got: +3/2": ("--part", "3/2"),
    }.items():
        assert run(monkeypatch, *given, *more) == 2
        assert re.search(reason, capsys.readouterr().err)
    assert run(monkeypatch, *given, "--steps", "3", "--seed", "3", "--quality", "high") == 0
    assert f"{out}: 2 images" in capsys.readouterr().out
    assert_whole(out, plans["high"])
