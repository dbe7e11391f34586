"""Compute at export what a node makes of constants alone: loading refuses such nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from onnx import NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from ditfastattn.export.weights import inline_tensor, onnx_type


def folded(node: NodeProto, given: Mapping[str, Tensor], opset: int) -> list[Tensor]:
    """Return the outputs of ``node``, whose inputs are ``given``, as ONNX's evaluator has them."""
    inputs = [
        helper.make_tensor_value_info(name, onnx_type(tensor.dtype), list(tensor.shape))
        for name, tensor in given.items()
    ]
    results = [helper.make_empty_tensor_value_info(name) for name in node.output]
    model = helper.make_model(
        helper.make_graph([node], "constants", inputs, results),
        opset_imports=[helper.make_opsetid("", opset)],
    )
    arrays = {
        name: numpy_helper.to_array(inline_tensor(name, item)) for name, item in given.items()
    }
    return [_tensor(result) for result in ReferenceEvaluator(model).run(None, arrays)]


def _tensor(result: Any) -> Tensor:
    proto = numpy_helper.from_array(np.ascontiguousarray(result))
    if proto.data_type == onnx_type(torch.bfloat16):  # numpy has no such numbers of its own
        return torch.from_numpy(result.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(result))
