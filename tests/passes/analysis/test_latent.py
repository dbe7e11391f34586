"""The latent is found among a model's inputs, and no mask or image is taken for it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from ditfastattn.passes.analysis.latent import latent_candidates
from ditfastattn.passes.capture.exported import capture_exported
from tests.helpers import TINY_MODELS, capture_model, captured_once, noise

CHANNELS, SIZE, WIDTH = 4, 4, 8


class Tokens(nn.Module):
    """Project an image to tokens and back; ``outputs`` times its channels come out."""

    def __init__(self, inputs: int = CHANNELS, outputs: int = CHANNELS) -> None:
        super().__init__()
        self.embed = nn.Conv2d(inputs, WIDTH, 1)
        self.unembed = nn.Conv2d(WIDTH, outputs, 1)

    def between(self, tokens: Tensor, other: Tensor) -> Tensor:
        return tokens

    def merge(self, image: Tensor, other: Tensor) -> Tensor:
        return image

    def forward(self, other: Tensor, image: Tensor) -> Tensor:
        other = other + 0.0  # used first, so that it is the graph's first input
        tokens = self.between(self.embed(self.merge(image, other)), other)
        result: Tensor = self.unembed(tokens)
        return result


class MaskedTokens(Tokens):
    def between(self, tokens: Tensor, other: Tensor) -> Tensor:
        return tokens * other.mean(1, keepdim=True)


class MaskedImage(Tokens):
    def merge(self, image: Tensor, other: Tensor) -> Tensor:
        return other * image


class Joined(Tokens):
    def merge(self, image: Tensor, other: Tensor) -> Tensor:
        return torch.cat([other, image], 1)


def found(model: nn.Module, other: Sequence[int]) -> list[str]:
    call = {"other": noise(0, *other), "image": noise(1, 2, CHANNELS, SIZE, SIZE)}
    captured = capture_model(model.eval(), call)
    return [captured.inputs[index].name for index in latent_candidates(captured)]


@pytest.mark.parametrize(
    ("model", "other"),
    [
        (MaskedTokens(), (2, CHANNELS, SIZE, SIZE)),  # a mask just like the latent, not projected
        (MaskedTokens(), (2, 1, SIZE, SIZE)),
        (MaskedImage(), (2, 1, SIZE, SIZE)),
        (MaskedImage(), (1, CHANNELS, SIZE, SIZE)),  # of no batch
        (Joined(CHANNELS + 1), (2, 1, SIZE, SIZE)),
        (Joined(CHANNELS + 3, 2 * CHANNELS), (2, 3, SIZE, SIZE)),  # variances come out too
    ],
)
def test_a_mask_of_the_latents_size_is_not_taken_for_it(
    model: nn.Module, other: Sequence[int]
) -> None:
    assert found(model, other) == ["image"]


def test_both_of_two_inputs_alike_may_be_the_latent() -> None:
    assert set(found(MaskedImage(), (2, CHANNELS, SIZE, SIZE))) == {"other", "image"}


def test_without_an_input_of_the_outputs_size_there_is_none() -> None:
    class Packed(Tokens):
        def merge(self, image: Tensor, other: Tensor) -> Tensor:
            return image.view(-1, CHANNELS, SIZE, SIZE)

    call = {"other": noise(0, 2, 3), "image": noise(1, 2, CHANNELS * SIZE * SIZE)}
    assert latent_candidates(capture_model(Packed().eval(), call)) == ()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_latents_of_real_models_are_found(name: str) -> None:
    captured = captured_once(TINY_MODELS[name]()).graph
    (index,) = latent_candidates(captured)
    assert captured.inputs[index].name == "hidden_states"


class Returned(Tokens):
    """Return the other input, too, as models return the caches that they are given."""

    def forward(self, other: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(other, image), other


def test_what_a_program_returns_as_it_is_is_not_denoised() -> None:
    given = {"other": noise(1, 2, WIDTH, SIZE, SIZE), "image": noise(0, 2, CHANNELS, SIZE, SIZE)}
    captured = capture_exported(torch.export.export(Returned(), (), given))
    assert [captured.inputs[at].name for at in latent_candidates(captured)] == ["image"]
