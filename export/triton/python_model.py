"""Run ``model.onnx``, which lies beside this file, by the onnxruntime package.

This file is copied into a model repository, where Triton's Python backend runs it: it needs numpy
and onnxruntime there, and nothing of ditfastattn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]  # it has no annotations


class TritonPythonModel:
    """Answer requests with latents; Triton makes one object per instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the graph."""
        import triton_python_backend_utils as triton  # type: ignore[import-not-found]  # Triton's

        self._triton = triton
        config = json.loads(args["model_config"])
        self._joins = config["max_batch_size"] > 0
        self._output = config["output"][0]["name"]
        providers = ["CPUExecutionProvider"]
        if args["model_instance_kind"] == "GPU":
            providers.insert(0, "CUDAExecutionProvider")
        graph = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self._session = onnxruntime.InferenceSession(graph, providers=providers)
        self._inputs = [value.name for value in self._session.get_inputs()]
        used = self._session.get_providers()
        if used[0] != providers[0]:
            triton.Logger.log_warn(f"{graph}: {providers[0]} did not load; it runs on {used[0]}")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Generate for all requests together, or one after another if they cannot be joined."""
        given = [[self._tensor(request, name) for name in self._inputs] for request in requests]
        if not self._joins:
            return [self._answer(self._run(tensors)) for tensors in given]
        latents = self._run([np.concatenate(parts) for parts in zip(*given, strict=True)])
        ends = np.cumsum([len(tensors[0]) for tensors in given])
        return [self._answer(part) for part in np.split(latents, ends[:-1])]

    def _tensor(self, request: Any, name: str) -> Any:
        return self._triton.get_input_tensor_by_name(request, name).as_numpy()

    def _run(self, tensors: Sequence[Any]) -> Any:
        feeds = dict(zip(self._inputs, tensors, strict=True))
        return self._session.run([self._output], feeds)[0]

    def _answer(self, latents: Any) -> Any:
        if not np.isfinite(latents).all():
            error = self._triton.TritonError("the latents are not finite")
            return self._triton.InferenceResponse(error=error)
        return self._triton.InferenceResponse([self._triton.Tensor(self._output, latents)])
