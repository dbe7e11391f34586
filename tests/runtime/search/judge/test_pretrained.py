"""LPIPS and the CLIP score: with networks of random weights, and with what they need missing."""

from __future__ import annotations

import importlib.machinery
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import nn

from ditfastattn import ConfigError, TargetMissedError, calibrate
from ditfastattn.runtime.pipeline.prompts import HELD_OUT_SEED, as_images, generate, split_prompts
from ditfastattn.runtime.search.judge import pretrained
from ditfastattn.runtime.search.judge.judgement import judge_images, metric_values
from ditfastattn.runtime.search.judge.targets import Target
from tests.helpers import tiny_digits_pipeline
from tests.tiny_pipelines import tiny_pixart_pipeline

DENSE = torch.rand(2, 3, 40, 48, generator=torch.Generator().manual_seed(0))
PLANNED = (DENSE + torch.tensor([0.05, 0.3]).reshape(2, 1, 1, 1)).clamp(0.0, 1.0)
PROMPT = {"prompt": "a cat"}
WEIGHTS = "alexnet-of-the-test.pth"
CONTEXT = 12  # how many tokens the tiny text encoder reads


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Let no test see the networks of another."""
    yield
    pretrained._lpips_network.cache_clear()
    pretrained._clip.cache_clear()


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail where anything reaches for the network."""
    reached: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: reached.append(address))
    yield
    assert reached == []


def module(name: str, **members: Any) -> ModuleType:
    """Return a module that the import system takes for an installed one."""
    made = ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(made).update(members)
    return made


def alexnet(weights: object = None) -> SimpleNamespace:
    """Return AlexNet's layers, with random weights."""
    torch.manual_seed(0)

    def block(fan_in: int, fan_out: int) -> list[nn.Module]:
        return [nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.ReLU()]

    first: list[nn.Module] = [nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU()]
    layers = [*first, nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()]
    layers += [nn.MaxPool2d(3, 2), *block(192, 384), *block(384, 256), *block(256, 256)]
    return SimpleNamespace(features=nn.Sequential(*layers, nn.MaxPool2d(3, 2)))


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stand in for torchvision; return the place of AlexNet's weights, which are missing."""
    import torchmetrics.functional.image.lpips as functional
    import torchmetrics.image.lpip as modular

    enum = SimpleNamespace(DEFAULT=SimpleNamespace(url=f"https://example.invalid/{WEIGHTS}"))
    models = module("torchvision.models", alexnet=alexnet, AlexNet_Weights=enum)
    monkeypatch.setitem(sys.modules, "torchvision", module("torchvision", models=models))
    monkeypatch.setattr(functional, "_TORCHVISION_AVAILABLE", True)
    monkeypatch.setattr(modular, "_TORCHVISION_AVAILABLE", True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints" / WEIGHTS


def test_lpips_is_measured_for_each_image(torchvision: Path) -> None:
    torchvision.touch()
    target = Target.max_lpips(0.1)
    target.prepare({})
    first, second = judge_images(target, DENSE, PLANNED, {})
    assert 0.0 < first.value < second.value
    assert (first.damage, first.allowed) == (first.value, 0.1)
    assert target.worst([first.value, second.value]) == second.value
    assert metric_values(target, DENSE, DENSE.clone(), {}) == [0.0, 0.0]
    again = metric_values(target, DENSE, PLANNED, {})
    assert again == [first.value, second.value]  # nothing adds up


def test_a_plan_is_searched_to_lpips(torchvision: Path) -> None:
    torchvision.touch()
    pipeline = tiny_digits_pipeline(DDIMScheduler(clip_sample=False), size=32)
    call = {"class_labels": [1, 2], "num_inference_steps": 6}
    plans = [
        calibrate(
            pipeline, call, target=Target.max_lpips(bound), objective="flops", method="global"
        )
        for bound in (1e-6, 1e-3)
    ]
    for plan, bound in zip(plans, (1e-6, 1e-3), strict=True):
        assert plan.calibration.target is not None
        assert plan.calibration.target.name == "lpips"
        assert plan.calibration.held_out is not None
        assert plan.calibration.held_out.worst <= bound
    assert plans[0].changed < plans[1].changed


def test_lpips_repeats_a_single_channel(torchvision: Path) -> None:
    torchvision.touch()
    grey, other = DENSE[:, :1], PLANNED[:, :1]
    target = Target.max_lpips(0.1)
    repeated = metric_values(target, grey.repeat(1, 3, 1, 1), other.repeat(1, 3, 1, 1), {})
    assert metric_values(target, grey, other, {}) == repeated


def test_lpips_refuses_small_images_and_odd_channels(torchvision: Path) -> None:
    torchvision.touch()
    target, least = Target.max_lpips(0.1), 31
    metric_values(target, DENSE[..., :least, :least], PLANNED[..., :least, :least], {})
    with pytest.raises(ConfigError, match=r"too small for LPIPS[\s\S]*30 x 48"):
        metric_values(target, DENSE[..., :30, :], PLANNED[..., :30, :], {})
    with pytest.raises(ConfigError, match=r"LPIPS takes grey or RGB[\s\S]*2 channels"):
        metric_values(target, DENSE[:, :2], PLANNED[:, :2], {})


def test_lpips_without_weights_says_where_they_belong(torchvision: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{re.escape(str(torchvision))}[\s\S]*remedy:.*--min-"):
        Target.max_lpips(0.1).prepare({})


@pytest.mark.parametrize(
    ("package", "target"),
    [("torchvision", Target.max_lpips(0.1)), ("transformers", Target.min_clip_score(30.0))],
)
def test_a_missing_package_is_named(
    package: str, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for use in (
        lambda: target.prepare(PROMPT),
        lambda: metric_values(target, DENSE, PLANNED, PROMPT),
    ):
        with pytest.raises(
            ConfigError, match=rf"{package}, which is not[\s\S]*pip install {package}"
        ):
            use()


def test_a_package_that_cannot_be_imported_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator does not exist')")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be imported[\s\S]*operator does not exist"):
        Target.max_lpips(0.1).prepare({})


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save a tiny CLIP model with random weights and a tokenizer of letters."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    size |= {"num_attention_heads": 2, "projection_dim": 8}
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{one}</w>" for one in letters)]
    text = {"vocab_size": len(tokens), "bos_token_id": 0, "eos_token_id": 1}
    text |= {"max_position_embeddings": CONTEXT}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=size | text,
        vision_config=size | {"image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    folder = str(tmp_path_factory.mktemp("clip"))
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer = transformers.CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[]
    )
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    processor = transformers.CLIPProcessor(image_processor=images, tokenizer=tokenizer)
    processor.save_pretrained(folder)
    return folder


def test_the_clip_score_is_a_hundred_times_the_cosine(clip_folder: str) -> None:
    import transformers

    target = Target.min_clip_score(1.0, clip_model=clip_folder)
    target.prepare(PROMPT)
    values = metric_values(target, DENSE, PLANNED, PROMPT)
    loaded: Any = transformers
    model = loaded.CLIPModel.from_pretrained(clip_folder)
    processor = loaded.CLIPProcessor.from_pretrained(clip_folder)
    pictures = list((PLANNED * 255.0).round().to(torch.uint8))
    inputs = processor(text=["a cat"], images=pictures, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits_per_image.flatten() / model.logit_scale.exp()
    assert values == pytest.approx((100.0 * logits).clamp(min=0.0).tolist(), abs=1e-3)


def test_a_plan_is_searched_to_a_clip_score(clip_folder: str, tmp_path: Path) -> None:
    import safetensors.torch

    shutil.copytree(clip_folder, tmp_path, dirs_exist_ok=True)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    for side, norm in (
        ("visual", "vision_model.post_layernorm"),
        ("text", "text_model.final_layer_norm"),
    ):
        weights[f"{norm}.bias"] += 3.0  # all cosines are positive: random ones need not be
        weights[f"{side}_projection.weight"].abs_()
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    pipeline = tiny_pixart_pipeline()
    call: dict[str, Any] = {"num_inference_steps": 4, "height": 32, "width": 32}
    call |= {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 8}
    call["prompt"] = ["cat", "dog"]
    scored = Target.min_clip_score(1.0, clip_model=str(tmp_path))
    dense = [
        metric_values(scored, image, image, prompt.call)[0]
        for seed in (0, HELD_OUT_SEED)
        for prompt in split_prompts(call, seed)
        for image in [as_images(generate(pipeline, prompt))]
    ]
    target = Target.min_clip_score(0.9 * min(dense), clip_model=str(tmp_path))
    plan = calibrate(pipeline, call, target=target, method="global")
    found = plan.calibration
    assert found.target is not None
    assert found.held_out is not None
    assert (found.target.name, found.target.model) == ("clip-score", str(tmp_path))
    assert found.held_out.worst >= target.bound > 0.0
    assert plan.changed > 0
    missed = Target.min_clip_score(50.0 + max(dense) / 2.0, clip_model=str(tmp_path))
    with pytest.raises(TargetMissedError, match="even the dense model misses the target"):
        calibrate(pipeline, call, target=missed)


def test_clip_damage_is_measured_from_the_dense_image(clip_folder: str) -> None:
    target = Target.min_clip_score(1.0, clip_model=clip_folder)
    dense, planned = (metric_values(target, DENSE, images, PROMPT) for images in (DENSE, PLANNED))
    for entry, own, value in zip(
        judge_images(target, DENSE, PLANNED, PROMPT), dense, planned, strict=True
    ):
        assert entry.damage == pytest.approx(abs(own - value))
        assert entry.allowed == pytest.approx(own - 1.0)
    assert [entry.damage for entry in judge_images(target, DENSE, DENSE, PROMPT)] == [0.0, 0.0]


def test_each_prompt_is_read_with_its_images(clip_folder: str) -> None:
    target = Target.min_clip_score(1.0, clip_model=clip_folder)
    four = torch.cat([PLANNED, PLANNED])
    cats, dogs = (
        metric_values(target, DENSE, PLANNED, {"prompt": text}) for text in ("a cat", "dog")
    )
    assert cats != dogs
    both = metric_values(target, four, four, {"prompt": ["a cat", "dog"]})
    assert both == pytest.approx([*cats, *dogs], abs=1e-3)
    with pytest.raises(ConfigError, match=r"2 prompts, 3 images"):
        metric_values(target, four[:3], four[:3], {"prompt": ["a cat", "dog"]})


def test_grey_images_and_long_prompts_are_scored(clip_folder: str) -> None:
    target = Target.min_clip_score(1.0, clip_model=clip_folder)
    grey = PLANNED[:, :1]
    call = {"prompt": "cat " * CONTEXT}
    rgb = grey.repeat(1, 3, 1, 1)
    assert metric_values(target, grey, grey, call) == metric_values(target, rgb, rgb, call)


@pytest.mark.parametrize("call", [{}, {"prompt": None}, {"prompt": []}, {"prompt": ["cat", 3]}])
def test_the_clip_score_needs_a_prompt(call: dict[str, Any]) -> None:
    for use in (Target.prepare, lambda target, call: metric_values(target, DENSE, PLANNED, call)):
        with pytest.raises(ConfigError, match=r"call\['prompt'\][\s\S]*got:[\s\S]*expected:"):
            use(Target.min_clip_score(30.0), call)


def test_a_clip_model_that_is_missing_is_not_downloaded() -> None:
    pytest.importorskip("transformers")
    target = Target.min_clip_score(30.0, clip_model="nobody/no-such-clip")
    with pytest.raises(ConfigError, match=r"hub: [\s\S]*hf download nobody/no-such-clip"):
        target.prepare(PROMPT)


def test_a_folder_without_all_weights_is_refused(clip_folder: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{re.escape(str(tmp_path))}: the CLIP model"):
        Target.min_clip_score(30.0, clip_model=str(tmp_path)).prepare(PROMPT)
    import safetensors.torch

    for file in Path(clip_folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del weights["text_projection.weight"]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"no weights for text_projection.weight"):
        Target.min_clip_score(30.0, clip_model=str(tmp_path)).prepare(PROMPT)
