"""Products stay whole in a switch: parts are picked from them, the same numbers as before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]  # it has no annotations
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ditfastattn.export.tensorrt.keep_whole import keep_products_whole

BATCH, TOKENS, WIDTH = 2, 5, 4
PRODUCT = [
    helper.make_node("MatMul", ["x", "weight"], ["product"]),
    helper.make_node("Add", ["product", "bias"], ["biased"]),
]


def model_of(nodes: Sequence[NodeProto], parts: Sequence[int]) -> ModelProto:
    """Return a model of ``nodes``, the last of which splits into these sizes."""
    (axis,) = [item.i for item in nodes[-1].attribute]
    whole = [BATCH, TOKENS, WIDTH if nodes[-1].input[0] == "x" else 12]
    shapes = [[part if i == axis % 3 else n for i, n in enumerate(whole)] for part in parts]
    random = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {
        "weight": random.standard_normal((WIDTH, 12), np.float32),
        "bias": random.standard_normal(12, np.float32),
        "sizes": np.array(parts, np.int64),
    }
    outputs = [
        helper.make_tensor_value_info(f"part_{i}", TensorProto.FLOAT, shape)
        for i, shape in enumerate(shapes)
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [BATCH, TOKENS, WIDTH])
    held = [numpy_helper.from_array(item, name) for name, item in weights.items()]
    graph = helper.make_graph(nodes, "test", [given], outputs, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def split(of: str, parts: Sequence[int], axis: int = -1) -> NodeProto:
    names = [f"part_{i}" for i in range(len(parts))]
    return helper.make_node("Split", [of, "sizes"], names, axis=axis)


def results(model: ModelProto) -> list[np.ndarray]:
    x = np.random.default_rng(1).standard_normal((BATCH, TOKENS, WIDTH), np.float32)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found: list[np.ndarray] = session.run(None, {"x": x})
    return found


@pytest.mark.parametrize("of", ["biased", "product"])
@pytest.mark.parametrize("axis", [-1, 2])
def test_equal_parts_of_a_product_are_picked(of: str, axis: int) -> None:
    model = model_of([*PRODUCT, split(of, [4, 4, 4], axis)], [4, 4, 4])
    before = results(model)
    assert keep_products_whole(model) == 1
    onnx.checker.check_model(model, full_check=True)
    assert "Split" not in {node.op_type for node in model.graph.node}
    for was, now in zip(before, results(model), strict=True):
        np.testing.assert_array_equal(was, now)


@pytest.mark.parametrize(
    ("nodes", "parts"),
    [
        ([*PRODUCT, split("biased", [4, 6, 2])], [4, 6, 2]),  # parts of other sizes
        ([*PRODUCT, split("biased", [1, 4], axis=1)], [1, 4]),  # tokens, not features
        ([split("x", [2, 2])], [2, 2]),  # of no product
        (
            [
                *PRODUCT,
                helper.make_node("Mul", ["biased", "biased"], ["square"]),
                split("square", [6, 6]),
            ],
            [6, 6],
        ),
    ],
)
def test_other_splits_stay(nodes: list[NodeProto], parts: list[int]) -> None:
    model = model_of(nodes, parts)
    before = model.SerializeToString(deterministic=True)
    assert keep_products_whole(model) == 0
    assert model.SerializeToString(deterministic=True) == before
