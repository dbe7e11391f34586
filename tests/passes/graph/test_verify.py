"""The verifier rejects a broken graph and shows where."""

from __future__ import annotations

import pytest
import torch
from torch.fx import GraphModule

from ditfastattn import VerifyError
from ditfastattn.passes.graph.ir import aten, calls, clone, outputs, value
from ditfastattn.passes.graph.slots import output_slot, read_cache, write_cache
from ditfastattn.passes.graph.verify import verify
from tests.helpers import TINY_MODELS, capture_sites


@pytest.fixture(scope="module")
def dense() -> tuple[GraphModule, int, int]:
    captured, _ = capture_sites(TINY_MODELS["dit"]())
    return captured.module, len(captured.inputs), len(outputs(captured.module.graph))


def check(module: GraphModule, dense: tuple[GraphModule, int, int]) -> None:
    verify(module, dense[1], dense[2], after="broken-pass")


def test_a_sound_graph_passes(dense: tuple[GraphModule, int, int]) -> None:
    check(clone(dense[0]), dense)


def test_a_wrong_shape_is_rejected_with_the_lines_around_it(
    dense: tuple[GraphModule, int, int],
) -> None:
    module = clone(dense[0])
    node = calls(module.graph, aten.linear.default)[5]
    node.meta["val"] = value(node)[:2]
    with pytest.raises(VerifyError, match=r"after broken-pass: node linear_5: it claims") as caught:
        check(module, dense)
    lines = str(caught.value).splitlines()
    assert len([line for line in lines if line.startswith("> ")]) == 1
    assert len(lines) == 8


def test_a_wrong_dtype_is_rejected(dense: tuple[GraphModule, int, int]) -> None:
    module = clone(dense[0])
    node = calls(module.graph, aten.linear.default)[0]
    node.meta["val"] = value(node).to(torch.float64)
    with pytest.raises(VerifyError, match=r"claims .*float64"):
        check(module, dense)


def test_a_use_before_its_definition_is_rejected(dense: tuple[GraphModule, int, int]) -> None:
    module = clone(dense[0])
    first, last = calls(module.graph, aten.add.Tensor)[0], calls(module.graph, aten.add.Tensor)[-1]
    first.args = (last, first.args[1])
    with pytest.raises(VerifyError, match="not well formed"):
        check(module, dense)


def test_a_call_that_cannot_run_is_rejected(dense: tuple[GraphModule, int, int]) -> None:
    module = clone(dense[0])
    node = calls(module.graph, aten.linear.default)[3]
    node.args = (node.args[0], node.args[0])
    with pytest.raises(VerifyError, match="it cannot run"):
        check(module, dense)


def test_a_node_without_a_value_is_rejected(dense: tuple[GraphModule, int, int]) -> None:
    module = clone(dense[0])
    del calls(module.graph, aten.linear.default)[3].meta["val"]
    with pytest.raises(VerifyError, match="carries no fake value"):
        check(module, dense)


def test_mutation_is_rejected(dense: tuple[GraphModule, int, int]) -> None:
    module = clone(dense[0])
    calls(module.graph, aten.add.Tensor)[0].target = aten.add_.Tensor
    with pytest.raises(VerifyError, match="writes in place"):
        check(module, dense)


def test_an_extra_input_or_output_is_rejected(dense: tuple[GraphModule, int, int]) -> None:
    module = clone(dense[0])
    with module.graph.inserting_before(next(iter(module.graph.nodes))):
        module.graph.placeholder("stray").meta["val"] = torch.ones(1)
    with pytest.raises(VerifyError, match="inputs, expected"):
        check(module, dense)
    module = clone(dense[0])
    output = module.graph.output_node()
    output.args = ((*outputs(module.graph), outputs(module.graph)[0]),)
    with pytest.raises(VerifyError, match="outputs, expected"):
        check(module, dense)


def test_a_cache_output_that_is_an_input_is_rejected(
    dense: tuple[GraphModule, int, int],
) -> None:
    module = clone(dense[0])
    like = value(calls(module.graph, aten.linear.default)[0])
    slot = output_slot("site", 0)
    write_cache(module.graph, slot, read_cache(module.graph, slot, like))
    with pytest.raises(VerifyError, match="is a view of this input"):
        check(module, dense)
