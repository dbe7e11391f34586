"""The linter finds each trap, and passes what the exporter writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from ditfastattn.core.errors import VerifyError
from ditfastattn.export.lint import findings, lint

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def write(
    folder: Path,
    nodes: Sequence[NodeProto],
    kind: int = FLOAT,
    opset: int = 20,
    shape: Sequence[int] = (1, 2, 4, 4),
    initializers: Sequence[TensorProto] = (),
    result: int = 0,
) -> Path:
    """Write a graph from ``x`` to ``y``."""
    given = helper.make_tensor_value_info("x", kind, shape)
    made = helper.make_tensor_value_info("y", result or kind, ["a", "b", "c", "d"])
    graph = helper.make_graph(list(nodes), "g", [given], [made], list(initializers))
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, ir_version=10, opset_imports=opsets)
    path = folder / "graph.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_a_sound_graph_passes(tmp_path: Path) -> None:
    path = write(tmp_path, [helper.make_node("Softmax", ["x"], ["y"], axis=-1)])
    assert findings(path) == []
    lint(path)


def test_opset_25_attention_is_caught(tmp_path: Path) -> None:
    """The negative control: its window would be silently dropped."""
    node = helper.make_node("Attention", ["x", "x", "x"], ["y"], name="windowed")
    found = findings(write(tmp_path, [node], opset=25))
    assert any("TensorRT silently drops its window" in line for line in found)
    assert any("opset 25" in line for line in found)
    with pytest.raises(VerifyError, match="windowed"):
        lint(tmp_path / "graph.onnx")


def test_a_node_that_depends_on_no_input_is_caught(tmp_path: Path) -> None:
    one = numpy_helper.from_array(np.ones(4, np.float16), "one")
    nodes = [
        helper.make_node("Cast", ["one"], ["wide"], name="cast", to=FLOAT),
        helper.make_node("Mul", ["x", "wide"], ["y"]),
    ]
    found = findings(write(tmp_path, nodes, initializers=[one]))
    assert any("cast: Cast depends on no input" in line for line in found)


def test_sequences_are_caught(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("SplitToSequence", ["x"], ["s"], axis=1),
        helper.make_node("ConcatFromSequence", ["s"], ["y"], axis=1),
    ]
    found = findings(write(tmp_path, nodes))
    assert sum("TensorRT has no sequences" in line for line in found) == 2


def test_minus_infinity_in_fp16_is_caught(tmp_path: Path) -> None:
    mask = numpy_helper.from_array(np.full((4, 4), -np.inf, dtype=np.float16), "mask")
    nodes = [helper.make_node("Add", ["x", "mask"], ["y"])]
    assert "minus infinity" in findings(write(tmp_path, nodes, HALF, initializers=[mask]))[0]
    finite = numpy_helper.from_array(np.full((4, 4), -6e4, dtype=np.float16), "mask")
    assert findings(write(tmp_path, nodes, HALF, initializers=[finite])) == []


def scores(widened: bool) -> list[NodeProto]:
    cast = [helper.make_node("Cast", ["x"], ["q"], to=FLOAT)]
    name = "q" if widened else "x"
    return [
        *(cast if widened else []),
        helper.make_node("MatMul", [name, name], ["s"], name="scores"),
        helper.make_node("Softmax", ["s"], ["y"], axis=-1),
    ]


def test_widened_scores_are_caught(tmp_path: Path) -> None:
    found = findings(write(tmp_path, scores(True), HALF, result=FLOAT))
    assert {*found} == {"scores: scores of half precision in fp32: TensorRT does not fuse them"}
    assert findings(write(tmp_path, scores(False), HALF)) == []
    values = numpy_helper.from_array(np.zeros((4, 4), dtype=np.float32), "values")
    attended = helper.make_node("MatMul", ["w", "values"], ["y"])
    rounded = [*scores(True)[:-1], helper.make_node("Softmax", ["s"], ["w"], axis=-1), attended]
    path = write(tmp_path, rounded, HALF, initializers=[values], result=FLOAT)
    assert findings(path) == []  # a model in fp32 that rounds its queries
    attended = helper.make_node("MatMul", ["w", "q"], ["y"])
    path = write(tmp_path, [*rounded[:-1], attended], HALF, result=FLOAT)
    assert findings(path) == found  # its values are rounded too


@pytest.mark.parametrize("kind", ["Einsum", "Sin", "Asin"])
def test_bf16_where_it_is_not_allowed_is_caught(kind: str, tmp_path: Path) -> None:
    options = {"equation": "abcd->abdc"} if kind == "Einsum" else {}
    node = helper.make_node(kind, ["x"], ["y"], **options)
    found = findings(write(tmp_path, [node], TensorProto.BFLOAT16))
    assert any(f"{kind} does not take bfloat16" in line for line in found)


def test_an_unknown_operator_is_caught(tmp_path: Path) -> None:
    assert findings(write(tmp_path, [helper.make_node("Nonsense", ["x"], ["y"])]))
    node = helper.make_node("MultiHeadAttention", ["x"], ["y"], domain="com.microsoft")
    path = write(tmp_path, [node])
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    path.write_bytes(model.SerializeToString())
    assert findings(path)
