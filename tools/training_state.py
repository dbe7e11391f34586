"""Keep the state of a training run on disk, so that an interrupted run resumes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from ditfastattn.core.files import write_text_atomically
from ditfastattn.core.strict_json import read_json
from ditfastattn.core.tensor_files import read_tensors, write_tensors


class TrainingState:
    """The weights, their moving average and the Adam moments of one training run."""

    def __init__(self, folder: Path) -> None:
        """Use ``folder``, created if absent."""
        folder.mkdir(parents=True, exist_ok=True)
        self.tensors = folder / "train.safetensors"
        self.progress = folder / "progress.json"

    def save(
        self,
        model: torch.nn.Module,
        average: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        progress: dict[str, object],
    ) -> None:
        """Write everything that resuming needs."""
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in average.items()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in state.items()}
        write_tensors(self.tensors, {name: item.clone() for name, item in tensors.items()})
        write_text_atomically(self.progress, json.dumps(progress, indent=2))

    def load(
        self,
        model: torch.nn.Module,
        average: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        same_stage: int,
    ) -> dict[str, object]:
        """Restore the saved state; return its progress, empty for a new run."""
        if not self.progress.exists():
            return {}
        progress: dict[str, object] = read_json(self.progress, "the progress")
        tensors = read_tensors(self.tensors)
        model.load_state_dict(_under("model.", tensors))
        average.update(_under("average.", tensors))
        if progress["stage"] == same_stage:
            restored = optimizer.state_dict()
            moments: dict[int, dict[str, Tensor]] = {}
            for name, value in _under("adam.", tensors).items():
                index, moment = name.split(".")
                moments.setdefault(int(index), {})[moment] = value
            optimizer.load_state_dict(restored | {"state": moments})
        return progress


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = ((name, value) for name, value in tensors.items() if name.startswith(prefix))
    return {name.removeprefix(prefix): value for name, value in found}
