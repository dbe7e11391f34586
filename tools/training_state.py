"""Keep the state of a training run on disk, so that an interrupted run resumes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ditfastattn.core.files import write_text_atomically
from ditfastattn.core.strict_json import read_json
from ditfastattn.core.tensor_files import read_tensors, write_tensors


class TrainingState:
    """The weights, their moving average and the optimizers' moments of one training run."""

    def __init__(self, folder: Path) -> None:
        """Use ``folder``, created if absent."""
        folder.mkdir(parents=True, exist_ok=True)
        self.tensors = folder / "train.safetensors"
        self.progress = folder / "progress.json"

    def save(
        self,
        model: torch.nn.Module,
        average: dict[str, Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        progress: dict[str, object],
    ) -> None:
        """Write everything that resuming needs."""
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in average.items()}
        for number, optimizer in enumerate(optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                prefix = f"optimizer.{number}.{index}"
                tensors |= {f"{prefix}.{name}": value for name, value in state.items()}
        write_tensors(self.tensors, {name: item.clone() for name, item in tensors.items()})
        write_text_atomically(self.progress, json.dumps(progress, indent=2))

    def load(
        self,
        model: torch.nn.Module,
        average: dict[str, Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
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
            for number, optimizer in enumerate(optimizers):
                _restore(optimizer, _under(f"optimizer.{number}.", tensors))
        return progress

    def average(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Return the moving average of the weights, and the progress, as last saved.

        Raises:
            FileError: nothing has been saved in the folder.
        """
        progress: dict[str, object] = read_json(
            self.progress, "the progress", "name the folder that the training was given as --work"
        )
        return _under("average.", read_tensors(self.tensors)), progress


def _restore(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, moment = name.split(".")
        moments.setdefault(int(index), {})[moment] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = ((name, value) for name, value in tensors.items() if name.startswith(prefix))
    return {name.removeprefix(prefix): value for name, value in found}
