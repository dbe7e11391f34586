"""The plan book as a folder: what may be added, what it promises, and what damage is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import ditfastattn
from ditfastattn import Book, ConfigError, Figures, Plan, Target
from ditfastattn.core.errors import FileError
from ditfastattn.passes.plan.calibration import Measured
from ditfastattn.tools.faults.inject import Disk, in_child
from tests.helpers import attentive_pipeline
from tests.plans import plan_for
from tests.three_steps import CALL, STRATEGIES


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_for(attentive_pipeline(), CALL, STRATEGIES)


def figures(worst: float, metric: str = "ssim") -> Figures:
    measured = Measured(prompts=4, mean=worst, worst=worst)
    return Figures(source="validation", metric=metric, quality=measured)


def changed(plan: Plan, strength: float) -> Plan:
    """Return a plan of other content, for the same generations."""
    calibration = plan.calibration.model_copy(update={"strength": strength})
    return plan.model_copy(update={"calibration": calibration})


@pytest.fixture
def made(tmp_path: Path) -> Book:
    tiers = {"high": Target.min_ssim(0.98), "medium": Target.min_ssim(0.9)}
    return ditfastattn.book(tmp_path / "book", tiers, default="medium")


def test_a_book_is_opened_as_it_was_left(made: Book, plan: Plan) -> None:
    entry = made.add(plan, "high", figures(0.99))
    opened = ditfastattn.book(made.folder)
    assert opened.manifest.names == ("lossless", "high", "medium")
    assert opened.manifest.default == "medium"
    assert opened.plans == ((entry, plan),)
    assert (entry.tier, entry.figures.quality.worst) == ("high", 0.99)


def test_a_book_that_is_not_there_is_not_made_by_opening_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the plan book"):
        ditfastattn.book(tmp_path / "book")
    assert not (tmp_path / "book").exists()


def test_other_tiers_than_those_of_the_book_are_refused(made: Book) -> None:
    with pytest.raises(ConfigError, match=r"other tiers[\s\S]*ssim >= 0.98[\s\S]*psnr >= 30"):
        ditfastattn.book(made.folder, {"high": Target.min_psnr(30)})


@pytest.mark.parametrize(
    ("tiers", "reason"),
    [
        ({"fast": Target.min_speedup(2.0)}, "a tier promises a quality"),
        ({"lossless": Target.min_ssim(0.9)}, "lossless"),
        ({"auto": Target.min_ssim(0.9)}, "auto"),
        ({"../high": Target.min_ssim(0.9)}, "pattern"),
    ],
)
def test_bad_tiers_are_refused(tmp_path: Path, tiers: dict[str, Target], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ditfastattn.book(tmp_path / "book", tiers)


def test_a_plan_that_breaks_the_promise_of_its_tier_is_refused(made: Book, plan: Plan) -> None:
    with pytest.raises(ConfigError, match=r"does not keep the promise[\s\S]*0\.97[\s\S]*0\.98"):
        made.add(plan, "high", figures(0.97))
    with pytest.raises(ConfigError, match="by another metric"):
        made.add(plan, "high", figures(40.0, "psnr"))
    with pytest.raises(ConfigError, match="not measured on held-out prompts"):
        made.add(plan, "high")
    with pytest.raises(ConfigError, match=r"no such tier of plans[\s\S]*expected: high, medium"):
        made.add(plan, "low", figures(0.99))
    assert ditfastattn.book(made.folder).plans == ()


def test_a_better_plan_for_the_same_requests_takes_the_place_of_the_old_one(
    made: Book, plan: Plan
) -> None:
    made.add(plan, "high", figures(0.98))
    made.add(plan, "medium", figures(0.98))
    better = changed(plan, 0.5)
    made.add(better, "high", figures(0.99))
    assert [(e.tier, each) for e, each in made.plans] == [("medium", plan), ("high", better)]


def test_pruning_removes_broken_promises_and_files_of_no_plan(made: Book, plan: Plan) -> None:
    kept = made.add(plan, "medium", figures(0.95))
    broken = made.add(changed(plan, 0.5), "high", figures(0.99))
    made.record({broken: figures(0.97)})
    (made.folder / "plan-0123456789abcdef.json").write_text("{}")  # of a writer that was killed
    (made.folder / "notes.txt").write_text("mine")
    assert [entry.tier for entry in made.broken()] == ["high"]
    assert set(made.prune()) == {broken.file, "plan-0123456789abcdef.json"}
    assert [entry for entry, _ in ditfastattn.book(made.folder).plans] == [kept]
    assert (made.folder / "notes.txt").exists()


def test_what_another_process_has_added_is_kept(made: Book, plan: Plan) -> None:
    other = ditfastattn.book(made.folder)
    other.add(plan, "high", figures(0.99))
    made.add(changed(plan, 0.5), "medium", figures(0.99))
    assert [entry.tier for entry, _ in ditfastattn.book(made.folder).plans] == ["high", "medium"]


def test_a_damaged_book_is_refused(made: Book, plan: Plan) -> None:
    entry = made.add(plan, "high", figures(0.99))
    path = made.folder / entry.file
    content = path.read_text()
    path.write_text(content.replace('"full"', '"share-step"', 1))
    with pytest.raises(ConfigError, match="was changed since it was added"):
        ditfastattn.book(made.folder)
    path.unlink()
    with pytest.raises(ConfigError, match="cannot read a plan of the book"):
        ditfastattn.book(made.folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "../../etc/passwd0"),
        ("tier", "low"),
        ("sha256", "0" * 64),
        ("more", 1),
    ],
)
def test_a_manifest_of_other_content_is_refused(
    made: Book, plan: Plan, field: str, value: object
) -> None:
    made.add(plan, "high", figures(0.99))
    manifest = made.folder / "book.json"
    data = json.loads(manifest.read_text())
    data["plans"][0][field] = value
    manifest.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=r"book\.json"):
        ditfastattn.book(made.folder)


def added(book: Book, plan: Plan) -> None:
    book.add(plan, "high", figures(0.99))


def pruned(book: Book, plan: Plan) -> None:
    book.record({entry: figures(0.1) for entry, each in book.plans if each != plan})
    book.prune()


@pytest.mark.parametrize("change", [added, pruned])
@pytest.mark.parametrize("full", [False, True], ids=["killed", "the disk is full"])
def test_a_change_that_fails_anywhere_leaves_a_whole_book(
    made: Book, plan: Plan, full: bool, change: Callable[..., None]
) -> None:
    """At each change of the folder; what was not finished is removed by the next pruning."""
    made.add(plan, "high", figures(0.99))
    other, whole = changed(plan, 0.5), made.folder.with_name("whole")
    shutil.copytree(made.folder, whole)
    at, over = 0, False
    while not over:
        shutil.rmtree(made.folder)
        shutil.copytree(whole, made.folder)
        code = in_child(partial(_fail, made.folder, at, full, partial(change, plan=other)))
        assert code in (0, FAILED, -signal.SIGKILL)
        over = code == 0
        opened = ditfastattn.book(made.folder)
        assert [each for _, each in opened.plans] in ([plan], [other], [])
        opened.add(other, "high", figures(0.99))
        opened.prune()
        names = {path.name for path in made.folder.iterdir()} - {".book.lock"}
        assert names == {"book.json", opened.plans[0][0].file}
        at += 1
    assert at > 3


def test_a_book_in_a_read_only_folder_is_opened_and_not_changed(
    made: Book, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = made.add(plan, "high", figures(0.99))
    own = os.open

    def read_only(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return own(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", read_only)
    tiers = {"high": Target.min_ssim(0.98), "medium": Target.min_ssim(0.9)}
    opened = ditfastattn.book(made.folder, tiers, default="medium")
    assert opened.plans == ((entry, plan),)
    for change in (added, pruned):
        with pytest.raises(FileError, match="choose a place that can be written to"):
            change(opened, plan=changed(plan, 0.5))
    assert opened.plans == ((entry, plan),)


FAILED = 3  # the exit code of a process in which a change has failed with an error of ours


def _fail(folder: Path, at: int, full: bool, change: Callable[[Book], None]) -> None:
    """Change the book in ``folder``, in a process of its own, which fails at a change of a file."""
    disk = Disk()
    try:
        with disk.failing(folder, at, full):
            change(ditfastattn.book(folder))
    except ConfigError:
        os._exit(FAILED)
    if disk.reached:
        os._exit(FAILED)  # it could do without what has failed
