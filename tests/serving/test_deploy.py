"""The Kubernetes example holds pods that Kubernetes takes; no cluster runs them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

kubernetes_validate = pytest.importorskip("kubernetes_validate")

EXAMPLE = Path(__file__).parents[2] / "examples" / "deploy" / "rayservice.yaml"
KUBERNETES = "1.30"


def pods() -> list[dict[str, Any]]:
    cluster = yaml.safe_load(EXAMPLE.read_text())["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    about = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}}
    return [{**about, **group["template"]} for group in groups]


def test_its_pods_follow_the_schema_of_kubernetes() -> None:
    for pod in pods():
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        wrong = copy.deepcopy(pod)
        (container,) = wrong["spec"]["containers"]
        container["volumeMount"] = container.pop("volumeMounts")
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, KUBERNETES, strict=True)
