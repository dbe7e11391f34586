"""In low memory, graphs read the weights where the file is mapped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from ditfastattn.runtime.bundle.graph_file import GraphFile, WeightsFile, read_graph
from ditfastattn.runtime.bundle.graph_size import measure
from ditfastattn.runtime.bundle.onnx_graph import OnnxGraph, SessionOptions
from ditfastattn.runtime.bundle.specs import TensorSpec
from ditfastattn.tools.measure import process_memory


def graph(weight: npt.NDArray[np.float32], nodes: list[onnx.NodeProto]) -> GraphFile:
    """Return a graph of the input x, the output y, and ``weight`` as w, which lies in a file."""
    shape = weight.shape
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    made = helper.make_graph(nodes, "graph", ports[:1], ports[1:])
    place = {"location": "weights.bin", "offset": "0", "length": str(weight.nbytes)}
    tensor = TensorProto(name="w", data_type=1, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in place.items():
        tensor.external_data.add(key=key, value=value)
    made.initializer.append(tensor)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x, y = (TensorSpec(name=name, dtype="float32", shape=shape) for name in "xy")
    weights = WeightsFile("weights.bin", weight.tobytes())
    content = model.SerializeToString()
    return read_graph(Path("graph.onnx"), content, weights, [x], [y], measure(model, [x]))


def test_sessions_do_not_copy_the_weights() -> None:
    weight = np.zeros((4096, 4096), np.float32)
    file = graph(weight, [helper.make_node("MatMul", ["x", "w"], ["y"])])
    before = process_memory("RssAnon")
    opened = [OnnxGraph(file, ["x"], ["y"], SessionOptions(low_memory=True)) for _ in range(2)]
    assert process_memory("RssAnon") - before < weight.nbytes / 2
    assert len(opened) == 2


@pytest.mark.parametrize("operator", ["Mul", "MatMul"])
def test_a_weight_past_which_transposes_move_is_as_it_was(operator: str) -> None:
    weight = np.arange(64, dtype=np.float32).reshape(4, 4, 4)
    turn, back = ((2, 0, 1), (1, 2, 0))
    nodes = [
        helper.make_node("Transpose", ["x"], ["turned"], perm=turn),
        helper.make_node(operator, ["turned", "w"], ["product"]),
        helper.make_node("Transpose", ["product"], ["y"], perm=back),
    ]
    x = torch.arange(64.0).reshape(4, 4, 4).sin()
    product = {"Mul": torch.mul, "MatMul": torch.matmul}[operator]
    expected = product(x.permute(turn), torch.from_numpy(weight)).permute(back)
    got = torch.empty_like(x)
    session = OnnxGraph(graph(weight, nodes), ["x"], ["y"], SessionOptions(low_memory=True))
    session([x], [got])
    torch.testing.assert_close(got, expected)
