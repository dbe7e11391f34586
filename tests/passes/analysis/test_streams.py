"""Text and image tokens are told apart where a graph joins them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ditfastattn.passes.analysis.site import Site, SiteKind, attentions
from ditfastattn.passes.analysis.sites import find_sites
from tests.helpers import capture_model

TEXT, IMAGE = 6, 16


class Joint(torch.nn.Module):
    """Join text and image tokens in one way or another, and let them attend."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.qkv = torch.nn.Linear(16, 48)
        self.out = torch.nn.Linear(16, 16)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        text = text * timestep.view(-1, 1, 1)
        if self.case == "rows":  # each with the words of its own prompt
            rows = [
                self.attend(torch.cat([x[i : i + 1], text[i : i + 1, : TEXT - i]], dim=1))
                for i in range(2)
            ]
            return torch.cat([row[:, :IMAGE] for row in rows])
        if self.case == "sequence first":
            joined = torch.cat([text.transpose(0, 1), x.transpose(0, 1)])  # [N, B, C]
            return self.attend(joined.transpose(0, 1))[:, TEXT:]
        if self.case == "keys alone":
            x = x + text.mean(dim=1, keepdim=True)  # as after a block
            both = torch.cat([self.heads(text), self.heads(x)], dim=3)
            return self.attended(self.heads(x)[0], *both[1:])
        if self.case == "image keys first":
            both = torch.cat([self.heads(x), self.heads(text)], dim=3)
            return self.attended(self.heads(x)[0], *both[1:])
        if self.case == "some queries":
            x = x + text.mean(dim=1, keepdim=True)
            both = torch.cat([self.heads(text), self.heads(x)], dim=3)
            return self.attended(self.heads(x[:, : IMAGE // 2])[0], *both[1:])
        both = torch.cat([self.heads(x), self.heads(x.flip(1))], dim=3)
        return self.attended(*both)[:, :IMAGE]

    def attend(self, joined: Tensor) -> Tensor:
        """Attend among all tokens of ``joined``."""
        return self.attended(*self.heads(joined))

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the projected output, ``[B, N, C]``."""
        found: Tensor = self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return found

    def heads(self, item: Tensor) -> Tensor:
        """Return queries, keys and values, ``[3, B, H, N, D]``."""
        found: Tensor = self.qkv(item)
        return found.reshape(*found.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)


def sites_of(case: str) -> list[Site]:
    call = {
        "x": torch.randn(2, IMAGE, 16),
        "timestep": torch.rand(2),
        "text": torch.randn(2, TEXT, 16),
    }
    return list(attentions(find_sites(capture_model(Joint(case), call)).sites))


def test_a_sequence_first_model_joins_along_the_first_dimension() -> None:
    (site,) = sites_of("sequence first")
    assert (site.kind, site.tokens, site.text) == (SiteKind.JOINT, TEXT + IMAGE, (TEXT, 0))
    assert site.window


def test_rows_with_texts_of_their_own_lengths_are_told_apart() -> None:
    first, second = sites_of("rows")
    assert (first.text, second.text) == ((0, TEXT), (0, TEXT - 1))
    assert first.window
    assert second.window


@pytest.mark.parametrize(
    ("case", "text"), [("keys alone", (TEXT, 0)), ("image keys first", (0, TEXT))]
)
def test_text_tokens_may_be_keys_alone(case: str, text: tuple[int, int]) -> None:
    (site,) = sites_of(case)
    assert (site.kind, site.tokens, site.text) == (SiteKind.JOINT, IMAGE, text)
    assert site.image_tokens == IMAGE
    assert site.window


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (
            "some queries",
            "its 22 tokens, which 8 queries attend, are not joined from two parts of which only "
            "one depends on the latent",
        ),
        (
            "both of the latent",
            "its 32 tokens are not joined from two parts of which only one depends on the latent",
        ),
    ],
)
def test_joint_attention_that_is_not_told_apart_says_why(case: str, reason: str) -> None:
    found = {site.no_window for site in sites_of(case)}
    assert found == {reason}
