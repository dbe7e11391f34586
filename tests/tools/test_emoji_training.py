"""Test the data, the training, the publishing and the evaluation of the emoji model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.search.judge.judgement import metric_values
from ditfastattn.runtime.search.judge.targets import Target
from ditfastattn.tools.emoji import evaluate, model, publish, recipe, sprites, train
from ditfastattn.tools.emoji.model import CaptionedTransformer
from ditfastattn.tools.emoji.pipeline import load_pipeline
from ditfastattn.tools.emoji.read_back import StillObeyed, best_fit_psnr, read_hues, read_things
from ditfastattn.tools.emoji.recipe import HUES, SPRITES, VOCABULARY, Stage, held_out, learning_rate
from ditfastattn.tools.training import set_image_size, update
from ditfastattn.tools.training_state import TrainingState
from tests.tiers import slow_but
from tests.tools.tiny_emoji import TINY


def drawn_sprites() -> Tensor:
    """Return 24 sprites that differ: blots of few colours, ``[24, 4, 64, 64]``."""
    generator = torch.Generator().manual_seed(0)
    blots = torch.rand(len(SPRITES), 4, 4, 4, generator=generator)
    large = torch.nn.functional.interpolate(blots, size=(64, 64), mode="bicubic").clamp(0, 1)
    axis = torch.linspace(-1, 1, 64)
    opaque = (axis[:, None].square() + axis.square() < 0.6).float()
    return torch.cat([large[:, :3] * opaque, opaque.expand(len(SPRITES), 1, 64, 64)], 1)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a package of drawn sprites that is taken for the pinned one."""
    path = tmp_path / "package.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for code, sprite in zip(SPRITES.values(), drawn_sprites(), strict=True):
            pixels = (sprite.permute(1, 2, 0) * 255).round().byte().numpy()
            content = BytesIO()
            Image.fromarray(pixels).save(content, format="WEBP", lossless=True)
            member = tarfile.TarInfo(f"package/assets/{code}.webp")
            member.size = content.tell()
            content.seek(0)
            archive.addfile(member, content)
    monkeypatch.setattr(sprites, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def pictures(tokens: Tensor, size: int = 64) -> Tensor:
    """Return pictures in [0, 1] of what ``tokens`` say."""
    generator = torch.Generator().manual_seed(1)
    return sprites.compose(drawn_sprites(), tokens, size, generator) / 2 + 0.5


def every_thing_and_hue() -> Tensor:
    return torch.tensor(
        [
            VOCABULARY.tokens(caption)
            for caption in VOCABULARY.captions()
            if caption.facing == "left"
        ]
    )


def test_sprites_are_read_and_the_rocket_turned(package: Path) -> None:
    loaded = sprites.load_sprites(package)
    rocket = list(SPRITES).index("rocket")
    expected = drawn_sprites()
    expected[rocket] = expected[rocket].flip(-1)
    torch.testing.assert_close(loaded, expected, rtol=0, atol=2 / 255)


def test_another_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)not there.*remedy: +download it: npm pack @lobehub"
    ):
        sprites.load_sprites(tmp_path / "absent.tgz")
    (tmp_path / "other.tgz").write_bytes(b"other")
    with pytest.raises(ConfigError, match=r"(?s)not the one.*got: +SHA-256 d9298a.*1\.1\.0"):
        sprites.load_sprites(tmp_path / "other.tgz")


def test_held_out_pairs_are_never_trained_on() -> None:
    tokens = sprites.training_tokens(20_000, torch.Generator().manual_seed(0)).tolist()
    seen = {(thing, hue - len(SPRITES)) for thing, hue, _ in tokens}
    pairs = {(thing, hue) for thing in range(len(SPRITES)) for hue in range(len(HUES))}
    unseen = {pair for pair in pairs if held_out(*pair)}
    assert seen == pairs - unseen
    assert [thing for thing, _ in sorted(unseen)] == list(range(len(SPRITES)))
    assert {hue for _, hue in unseen} == set(range(len(HUES)))


def test_pictures_are_read_back() -> None:
    tokens = every_thing_and_hue()
    images = pictures(tokens)
    assert torch.equal(read_hues(images), tokens[:, 1] - len(SPRITES))
    assert torch.equal(read_things(images[::8], drawn_sprites()), tokens[::8, 0])


def test_whether_a_prompt_is_still_obeyed_is_a_target() -> None:
    asked = [f"a {thing} on {hue}" for thing, hue in (("fox", "red"), ("pig", "blue"))]
    images = pictures(torch.tensor([VOCABULARY.tokens(VOCABULARY.parse(text)) for text in asked]))
    target = Target.quality(StillObeyed(drawn_sprites()), at_least=1)
    call, red_pig = {"prompt": asked}, {"prompt": "a pig on red"}
    assert metric_values(target, images, images, call) == [1, 1]
    assert metric_values(target, images, images.flip(0), call) == [0, 0]
    assert metric_values(target, images[:1], images[1:], red_pig) == [1]  # dense shows a fox
    assert target.name == "StillObeyed"


def test_a_fit_tells_sprites_facings_and_blur_apart() -> None:
    tokens = torch.tensor([VOCABULARY.tokens(VOCABULARY.parse("a fox on red"))])
    fox, pig = drawn_sprites()[1], drawn_sprites()[4]
    image = pictures(tokens)
    assert best_fit_psnr(image, fox, mirrored=False) > 35
    assert best_fit_psnr(image, fox, mirrored=True) < 20
    assert best_fit_psnr(image, pig, mirrored=False) < 20
    noisy = image + 0.1 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    assert best_fit_psnr(noisy, fox, mirrored=False) == pytest.approx(20, abs=0.5)


def test_the_learning_rate_waits_with_its_decay_for_the_cooldown() -> None:
    stage = Stage(size=64, steps=100, batch=1, learning_rate=1.0, warmup=10, cooldown=0.2)
    rates = [learning_rate(stage, step) for step in range(stage.steps)]
    assert rates[0] == pytest.approx(0.1)
    assert set(rates[9:80]) == {1.0}
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)


def test_full_model_is_small_enough_to_embed() -> None:
    parameters = sum(value.numel() for value in CaptionedTransformer().parameters())
    assert 2 * parameters <= 11_500_000  # fp16 bytes; the folder may hold 12 MB


class _Run:
    """Trains a tiny model on the package of drawn sprites, counting steps."""

    def __init__(self, package: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.package, self.work, self.patch = package, work, monkeypatch
        self.sizes: list[int] = []
        self.stop_after = 1000
        tiny = recipe.MODEL_CONFIG | TINY | {"sample_size": 64, "patch_size": 16}
        monkeypatch.setattr(model, "MODEL_CONFIG", tiny)
        stages = tuple(
            Stage(size, steps=3, batch=2, learning_rate=1e-3, warmup=1) for size in (32, 64)
        )
        monkeypatch.setattr(train, "STAGES", stages)
        inner = train.training_loss

        def counted(model: Any, pictures: Tensor, stage: Stage, generator: Any) -> Tensor:
            if len(self.sizes) == self.stop_after:
                raise KeyboardInterrupt
            self.sizes.append(stage.size)
            return inner(model, pictures, stage, generator)

        monkeypatch.setattr(train, "training_loss", counted)

    def train(self, **options: int) -> list[int]:
        """Train until the end; return the size of the pictures at each step taken."""
        self.sizes.clear()
        extra = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        arguments = ["--package", str(self.package), "--work", str(self.work), "--save-every", "2"]
        self.patch.setattr(sys, "argv", ["train", *arguments, *extra])
        train.main()
        return self.sizes


@pytest.fixture
def training(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Run:
    return _Run(package, tmp_path / "work", monkeypatch)


def test_interrupted_training_resumes_and_finished_training_goes_on(training: _Run) -> None:
    training.stop_after = 5
    with pytest.raises(KeyboardInterrupt):
        training.train()
    training.stop_after = 1000
    assert training.train() == [64]  # saved after two of three steps
    assert training.train() == []
    assert training.train(steps=5) == [64, 64]


def test_resuming_takes_up_the_moments_of_both_optimizers(training: _Run) -> None:
    training.train(steps=2)
    loaded: list[Any] = []
    restore = TrainingState.load

    def watched(self: Any, model: Any, average: Any, optimizers: Any, stage: int) -> Any:
        progress = restore(self, model, average, optimizers, stage)
        loaded.extend(optimizers if stage == 1 else ())
        return progress

    training.patch.setattr(TrainingState, "load", watched)
    training.train(steps=2)
    muon, adam = (optimizer.state_dict()["state"] for optimizer in loaded)
    assert set(muon[0]) == {"momentum_buffer"}
    assert adam[0]["step"] == 2
    assert all(state["momentum_buffer"].any() for state in muon.values())


def test_training_lowers_the_loss(training: _Run) -> None:
    torch.manual_seed(0)
    stage = Stage(size=32, steps=60, batch=8, learning_rate=1e-2, warmup=1)
    tiny = CaptionedTransformer()
    set_image_size(tiny.transformer, stage.size)
    generator = torch.Generator().manual_seed(0)
    optimizers = train.optimizers_of(tiny)
    train.set_learning_rate(optimizers, stage.learning_rate)
    losses = []
    for _ in range(stage.steps):
        loss = train.training_loss(tiny, drawn_sprites(), stage, generator)
        update(tiny, optimizers, loss)
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.93 * sum(losses[:5]) / 5


@pytest.mark.parametrize(("stop_after", "size"), slow_but({(1000, 64)}, [(2, 32), (1000, 64)]))
def test_a_checkpoint_is_published_and_evaluated(
    training: _Run, tmp_path: Path, stop_after: int, size: int
) -> None:
    training.stop_after = stop_after
    with contextlib.suppress(KeyboardInterrupt):
        training.train()
    out = tmp_path / "model"
    publish.publish(training.work, out)
    assert {file.stat().st_mode & 0o777 for file in out.rglob("*.*")} == {0o644}
    assert "Copyright (c) Microsoft Corporation" in (out / "NOTICE.md").read_text()
    card = (out / "README.md").read_text()
    assert f"steps of the stage at {size}x{size}" in card
    assert sprites.DOWNLOAD in card
    loaded = load_pipeline(out)
    loaded.set_progress_bar_config(disable=True)  # type: ignore[no-untyped-call]  # diffusers
    (image,) = loaded("a panda on blue", num_inference_steps=2, return_dict=False)[0]
    assert image.size == (size, size)
    ran = evaluated(out, training.package, tmp_path, "--every", "32")
    assert ran.exit_code == 1  # three steps teach nothing
    assert "not fit to ship" in ran.stdout
    record = json.loads((tmp_path / "emoji.json").read_text())
    assert record["pictures"] == 2 * 12
    assert record["held_out_psnr"] is None  # none among these twelve
    assert record["worst_psnr"] < record["mean_psnr"] < 20
    with Image.open(tmp_path / "emoji.png") as sheet:
        assert sheet.size == (12 * 64, 64)


def evaluated(folder: Path, package: Path, out: Path, *options: str) -> Any:
    """Return the run of the evaluation as the command line has it."""
    app = typer.Typer()
    app.command()(evaluate.run)
    files = ["--out", str(out / "emoji.json"), "--sheet", str(out / "emoji.png")]
    settings = ["--model", str(folder), "--package", str(package), "--seeds", "2", "--steps", "2"]
    return CliRunner().invoke(app, [*settings, *files, *options])


def test_evaluation_reports_a_missing_model(package: Path, tmp_path: Path) -> None:
    ran = evaluated(tmp_path / "absent", package, tmp_path)
    assert ran.exit_code == 2
    assert "there is no emoji pipeline here" in ran.stderr


def test_publishing_nothing_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)progress\.json.*remedy:.*--work"):
        publish.publish(tmp_path, tmp_path / "model")


@pytest.mark.parametrize(("noise", "passed"), [(0.0, True), (0.15, False)])
def test_the_gate_is_twenty_decibels_and_the_right_hue(noise: float, passed: bool) -> None:
    captions = VOCABULARY.captions()[:48]
    images = pictures(torch.tensor([VOCABULARY.tokens(caption) for caption in captions]))
    images = images + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    judged = evaluate.evaluate(images, captions, drawn_sprites(), 25, 2.5, 1.0)
    assert judged.passed is passed
    assert judged.right_thing == 1.0
    assert judged.right_hue >= 0.95
    assert judged.held_out_psnr == pytest.approx(judged.mean_psnr, abs=2.0)
    swapped = evaluate.evaluate(images.flip(1), captions, drawn_sprites().flip(0), 25, 2.5, 1.0)
    assert swapped.right_hue < 0.5
    assert not swapped.passed
