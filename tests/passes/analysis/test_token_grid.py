"""The grid of packed tokens follows from what the graph flattens on the way to them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ditfastattn.passes.analysis.token_grid import GridFinder
from ditfastattn.passes.graph.ir import ATTENTION, calls, value
from tests.helpers import capture_model

TOKENS = 24


def heads(x: Tensor) -> Tensor:
    """Turn ``[B, N, 16]`` into ``[B, 2, N, 8]``."""
    return x.view(2, TOKENS, 2, 8).transpose(1, 2)


def table(x: Tensor, ids: Tensor) -> Tensor:
    """Multiply by a table of rows and columns, expanded and flattened."""
    rows, columns = torch.linspace(0, 1, 4), torch.linspace(0, 1, 6)
    grid = torch.stack([rows.view(4, 1).expand(4, 6), columns.view(1, 6).expand(4, 6)], -1)
    return heads(x) * grid.reshape(TOKENS, 2).repeat(1, 4)


def coordinates(x: Tensor, ids: Tensor) -> Tensor:
    """Rotate by angles of coordinates of frames, rows and columns."""
    axes = [torch.arange(size, dtype=torch.float32) for size in (2, 3, 4)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")).unsqueeze(0).repeat(2, 1, 1, 1, 1)
    places = grid.flatten(2, 4).transpose(1, 2)  # [B, N, 3]
    angles = places[..., None] * torch.tensor([1.0, 0.5])
    angles = torch.nn.functional.pad(angles.flatten(2), (0, 2)).repeat(1, 1, 2)
    return heads(x * angles.cos() + x.roll(1, -1) * angles.sin())


def outer(x: Tensor, ids: Tensor) -> Tensor:
    places = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    tables = [torch.outer(place.reshape(-1), torch.linspace(0.1, 1, 4)) for place in places]
    return heads(x) * torch.cat(tables, 1).cos()[None, None]


def one_frame(x: Tensor, ids: Tensor) -> Tensor:
    grid = torch.linspace(0, 1, 4).view(1, 4, 1, 1).expand(1, 4, 6, 8)
    return heads(x) + grid.reshape(TOKENS, 8).clone()


def nested(x: Tensor, ids: Tensor) -> Tensor:
    """Flatten rows and columns, then frames."""
    image = torch.linspace(0, 1, 12).view(3, 4, 1).flatten(0, 1)
    video = torch.stack([image, 2 * image])  # [2, 12, 1]
    return heads(x) + video.reshape(TOKENS, 1)


def packed(x: Tensor, ids: Tensor) -> Tensor:
    """Take patches of 2 x 2 out of an image: the tokens are its places."""
    image = x.reshape(2, 4, 8, 12)
    patches = image.view(2, 4, 4, 2, 6, 2).permute(0, 2, 4, 1, 3, 5)
    return heads(patches.reshape(2, TOKENS, 16))


def given(x: Tensor, ids: Tensor) -> Tensor:
    angles = torch.outer(ids[:, 0].float(), torch.linspace(0.1, 1, 8))
    return heads(x) * angles.cos()


def plain(x: Tensor, ids: Tensor) -> Tensor:
    return heads(x)


def of_channels(x: Tensor, ids: Tensor) -> Tensor:
    """Flatten 4 x 6 to as many *channels* as there are tokens."""
    wide = torch.linspace(0, 1, 24).view(4, 6).reshape(1, 24).expand(TOKENS, 24)
    return heads(x) + (wide @ torch.ones(24, 8))


def joint(x: Tensor, ids: Tensor) -> Tensor:
    """Put text before the image, whose positions alone have a grid."""
    image = torch.cat(
        [torch.zeros(5, 8), torch.linspace(0, 1, 24).view(4, 6, 1).flatten(0, 1) + torch.zeros(8)]
    )
    text = torch.zeros(2, 2, 5, 8)
    return torch.cat([text, heads(x)], dim=2) * image


GRIDS: dict[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]] = {
    table: (4, 6),
    coordinates: (2, 3, 4),
    outer: (4, 6),
    one_frame: (4, 6),
    nested: (2, 3, 4),
    packed: (4, 6),
    joint: (4, 6),
    given: (),
    plain: (),
    of_channels: (),
}


class Attends(torch.nn.Module):
    def __init__(self, model: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        q = self.model(x, ids)
        return scaled_dot_product_attention(q, q, q) + ids.sum()


def finder(model: Callable[[Tensor, Tensor], Tensor]) -> tuple[list[str], tuple[int, ...]]:
    """Return the inputs that the tokens' axis leads to, and their grid."""
    call = {"x": torch.randn(2, TOKENS, 16), "ids": torch.zeros(TOKENS, 3)}
    captured = capture_model(Attends(model), call)
    (node,) = calls(captured.module.graph, ATTENTION)
    found = GridFinder()
    query = node.all_input_nodes[0]
    assert value(query).shape[-2] in (TOKENS, TOKENS + 5)
    grid = found.find(query, TOKENS)
    assert found.find(query, TOKENS) == grid  # the second attention is answered alike
    names = {captured.node(name): name for name in captured.dynamic_names}
    return [names[end] for end in found.inputs(TOKENS)], grid


@pytest.mark.parametrize("model", GRIDS, ids=lambda model: model.__name__)
def test_the_grid_is_what_was_flattened(model: Callable[[Tensor, Tensor], Tensor]) -> None:
    _, grid = finder(model)
    assert grid == GRIDS[model]


def test_the_inputs_that_hold_positions_are_named() -> None:
    assert sorted(finder(given)[0]) == ["ids", "x"]
    assert finder(plain)[0] == ["x"]
