"""``ditfastattn book``: make, fill, list, measure and prune a plan book."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

import ditfastattn
from ditfastattn import Strategy, Target
from tests.helpers import tiny_digits_pipeline
from tests.plans import plan_for
from tests.shell import exit_code

CALL = {"class_labels": [0], "num_inference_steps": 3, "guidance_scale": 2.0}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    pipeline: Any = tiny_digits_pipeline(DDIMScheduler(clip_sample=False))
    pipeline.save_pretrained(folder / "pipeline")
    rows = (Strategy.FULL, Strategy.SHARE_STEP, Strategy.SHARE_STEP)
    plan_for(pipeline, CALL, rows, Target.min_ssim(0.5)).save(folder / "plan.json")
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command as a shell does; return its exit code."""
    return exit_code(monkeypatch, "book", *arguments)


def test_a_book_from_nothing_to_a_pruned_one(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    book, plan, named = tmp_path / "book", files / "plan.json", ("--pipeline", files / "pipeline")
    tiers = ("--tier", "high=ssim:0.2", "--tier", "exact=psnr:500")
    assert run(monkeypatch, "create", book, *tiers, "--default", "exact") == 0
    assert run(monkeypatch, "add", book, plan, "--tier", "high") == 2
    assert "not measured on held-out prompts" in capsys.readouterr().err
    measure = ("--measure", *named, "--classes", "1,2")
    assert run(monkeypatch, "add", book, plan, "--tier", "exact", *measure) == 2
    assert "does not keep the promise" in capsys.readouterr().err
    assert run(monkeypatch, "add", book, plan, "--tier", "high", *measure) == 0
    (entry,) = (entry for entry, _ in ditfastattn.book(book).plans)
    assert (entry.figures.source, entry.figures.quality.prompts) == ("validation", 2)
    monkeypatch.setenv("COLUMNS", "200")
    assert run(monkeypatch, "list", book) == 0
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("psnr >= 500", entry.name, "worst of 2 prompts"))
    assert run(monkeypatch, "validate", book, *named, "--classes", "1,2,3") == 0
    assert ditfastattn.book(book).plans[0][0].figures.quality.prompts == 3
    manifest = book / "book.json"
    text = manifest.read_text().replace('"bound": 0.2', '"bound": 1.0')
    manifest.write_text(text)
    assert run(monkeypatch, "validate", book, *named, "--classes", "1") == 1
    assert "break the promise" in capsys.readouterr().err
    assert run(monkeypatch, "prune", book) == 0
    assert entry.file in capsys.readouterr().out
    assert run(monkeypatch, "prune", book) == 0
    assert "nothing to remove" in capsys.readouterr().out


@pytest.mark.parametrize("tier", ["high", "high=ssim", "high=fid:3", "high=ssim:x", "high=ssim:2"])
def test_a_tier_that_cannot_be_read_is_refused(
    tier: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "create", tmp_path / "book", "--tier", tier) == 2
    assert "such as high=ssim:0.98" in capsys.readouterr().err


def test_a_plan_that_the_call_does_not_fit_keeps_its_figures(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    book, named = tmp_path / "book", ("--pipeline", files / "pipeline", "--classes", "1")
    assert run(monkeypatch, "create", book, "--tier", "high=ssim:0.2") == 0
    arguments = (book, files / "plan.json", "--tier", "high", "--measure", *named)
    assert run(monkeypatch, "add", *arguments) == 0
    before = ditfastattn.book(book).plans
    other = ("--call", '{"num_inference_steps": 5}')
    assert run(monkeypatch, "validate", book, *named, *other) == 2
    assert "another number of steps" in capsys.readouterr().err
    assert ditfastattn.book(book).plans == before


def test_a_book_of_the_plans_that_come_with_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "create", tmp_path / "book", "--shipped", "emoji") == 0
    opened = ditfastattn.book(tmp_path / "book")
    assert opened.manifest.names == ("lossless", "strict", "middle", "loose")
    assert [entry.tier for entry, _ in opened.plans] == ["strict", "middle", "loose"]
    assert opened.broken() == ()
    for wrong in ((), ("--shipped", "emoji", "--tier", "high=ssim:0.9")):
        assert run(monkeypatch, "create", tmp_path / "other", *wrong) == 2
        assert "or --shipped alone" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
