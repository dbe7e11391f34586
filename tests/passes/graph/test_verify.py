"""The verifier rejects a broken graph and shows where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ditfastattn import VerifyError
from ditfastattn.passes.graph.fake_values import fake_mode
from ditfastattn.passes.graph.ir import (
    ATTENTION,
    aten,
    calls,
    clone,
    insert,
    outputs,
    replace_uses,
    value,
)
from ditfastattn.passes.graph.slots import output_slot, read_cache, write_cache
from ditfastattn.passes.graph.verify import Verifier, verify
from tests.helpers import TINY_MODELS, capture_sites

Dense = tuple[GraphModule, int, int]


@pytest.fixture(scope="module")
def dense() -> Dense:
    captured, _ = capture_sites(TINY_MODELS["dit"]())
    return captured.module, len(captured.inputs), len(outputs(captured.module.graph))


def check(module: GraphModule, dense: Dense) -> None:
    verify(module, dense[1], dense[2], after="broken-pass")


def test_a_sound_graph_passes(dense: Dense) -> None:
    check(clone(dense[0]), dense)


def test_a_wrong_shape_is_rejected_with_the_lines_around_it(
    dense: Dense,
) -> None:
    module = clone(dense[0])
    node = calls(module.graph, aten.linear.default)[5]
    node.meta["val"] = value(node)[:2]
    with pytest.raises(VerifyError, match=r"after broken-pass: node linear_5: it claims") as caught:
        check(module, dense)
    lines = str(caught.value).splitlines()
    assert len([line for line in lines if line.startswith("> ")]) == 1
    assert len(lines) == 8


def test_a_wrong_dtype_is_rejected(dense: Dense) -> None:
    module = clone(dense[0])
    node = calls(module.graph, aten.linear.default)[0]
    node.meta["val"] = value(node).to(torch.float64)
    with pytest.raises(VerifyError, match=r"claims .*float64"):
        check(module, dense)


def test_a_use_before_its_definition_is_rejected(dense: Dense) -> None:
    module = clone(dense[0])
    first, last = calls(module.graph, aten.add.Tensor)[0], calls(module.graph, aten.add.Tensor)[-1]
    first.args = (last, first.args[1])
    with pytest.raises(VerifyError, match="not well formed"):
        check(module, dense)


def test_a_call_that_cannot_run_is_rejected(dense: Dense) -> None:
    module = clone(dense[0])
    node = calls(module.graph, aten.linear.default)[3]
    node.args = (node.args[0], node.args[0])
    with pytest.raises(VerifyError, match="it cannot run"):
        check(module, dense)


def test_a_node_without_a_value_is_rejected(dense: Dense) -> None:
    module = clone(dense[0])
    del calls(module.graph, aten.linear.default)[3].meta["val"]
    with pytest.raises(VerifyError, match="carries no fake value"):
        check(module, dense)


def test_mutation_is_rejected(dense: Dense) -> None:
    module = clone(dense[0])
    calls(module.graph, aten.add.Tensor)[0].target = aten.add_.Tensor
    with pytest.raises(VerifyError, match="writes in place"):
        check(module, dense)


def test_an_extra_input_or_output_is_rejected(dense: Dense) -> None:
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


def test_a_slot_written_twice_is_rejected(dense: Dense) -> None:
    module = clone(dense[0])
    for node in calls(module.graph, aten.linear.default)[:2]:
        write_cache(module.graph, output_slot("site", 0), node)
    with pytest.raises(VerifyError, match="one each for"):
        check(module, dense)


def test_a_constant_of_another_dtype_is_rejected(dense: Dense) -> None:
    module = clone(dense[0])
    module.register_buffer("table", torch.ones(4, dtype=torch.float64))
    first = calls(module.graph, aten.linear.default)[0]
    with module.graph.inserting_before(first):
        constant = module.graph.get_attr("table")
        with fake_mode(module.graph):
            constant.meta["val"] = torch.ones(4)
        insert(module.graph, aten.neg.default, (constant,), first)
    with pytest.raises(VerifyError, match=r"claims float32\[4\] .* computes float64\[4\]"):
        check(module, dense)


VIEWS: dict[str, tuple[Any, Callable[[Tensor], tuple[Any, ...]]]] = {
    "itself": (None, lambda _: ()),
    "a view": (aten.view.default, lambda x: (list(x.shape),)),
    "a reshape": (aten.reshape.default, lambda _: ([-1],)),
    "a flattening": (aten.flatten.using_ints, lambda _: ()),
    "an unfolding": (aten.unfold.default, lambda _: (0, 1, 1)),
    "a diagonal": (aten.diagonal.default, lambda _: ()),
    "no cast": (aten.to.dtype, lambda x: (x.dtype,)),
    "no copy": (aten.contiguous.default, lambda _: ()),
    "an unmarked view": (aten._unsafe_view.default, lambda x: (list(x.shape),)),
    "an idle dropout": (aten.dropout.default, lambda _: (0.5, False)),
}


def viewed(source: Node, view: str) -> Node:
    target, arguments = VIEWS[view]
    if target is None:
        return source
    graph = source.graph
    with graph.inserting_before(graph.output_node()):
        return insert(graph, target, (source, *arguments(value(source))), source)


@pytest.mark.parametrize("view", list(VIEWS))
def test_a_cache_output_that_shares_memory_with_an_input_is_rejected(
    view: str, dense: Dense
) -> None:
    module = clone(dense[0])
    like = value(calls(module.graph, aten.linear.default)[0])
    source = read_cache(module.graph, output_slot("site", 0), like)
    write_cache(module.graph, output_slot("site", 0), viewed(source, view))
    with pytest.raises(VerifyError, match="is a view of this input"):
        check(module, dense)


@pytest.mark.parametrize("view", list(VIEWS))
@pytest.mark.parametrize("of", ["the result", "what the result is a view of"])
def test_a_cache_output_that_shares_memory_with_a_result_is_rejected(
    view: str, of: str, dense: Dense
) -> None:
    module = clone(dense[0])
    (result,) = outputs(module.graph)
    assert isinstance(result, Node)
    assert result.target is aten.reshape.default
    source: Any = result if of == "the result" else result.args[0]
    write_cache(module.graph, output_slot("site", 0), viewed(source, view))
    with pytest.raises(VerifyError, match="a cache output and a result of the model share"):
        check(module, dense)


@pytest.mark.parametrize("view", list(VIEWS))
def test_a_result_that_shares_memory_with_a_cache_input_is_rejected(
    view: str, dense: Dense
) -> None:
    module = clone(dense[0])
    (result,) = outputs(module.graph)
    source = read_cache(module.graph, output_slot("site", 0), value(result))
    module.graph.output_node().args = ((viewed(source, view),),)
    with pytest.raises(VerifyError, match="a result of the model is a view of this cache input"):
        check(module, dense)


def test_copies_share_no_memory(dense: Dense) -> None:
    module = clone(dense[0])
    (result,) = outputs(module.graph)
    read = read_cache(module.graph, output_slot("site", 0), value(result))
    for index, (source, target, arguments) in enumerate(
        [
            (read, aten.clone.default, ()),
            (read, aten.to.dtype, (torch.float64,)),
            (read, aten.dropout.default, (0.5, True)),
            (result, aten.neg.default, ()),
            (result, aten.cat.default, ()),
        ]
    ):
        with module.graph.inserting_before(module.graph.output_node()):
            first: Any = [source] if target is aten.cat.default else source
            assert isinstance(source, Node)
            copied = insert(module.graph, target, (first, *arguments), source)
        write_cache(module.graph, output_slot("site", index), copied)
    check(module, dense)


Verified = tuple[GraphModule, Verifier]


@pytest.fixture
def verified(dense: Dense) -> Verified:
    module = clone(dense[0])
    return module, Verifier(module, dense[1], dense[2])


def test_users_of_a_changed_value_are_checked(verified: Verified) -> None:
    module, verifier = verified
    first = calls(module.graph, aten.silu.default)[0]
    with module.graph.inserting_before(first):
        half = insert(module.graph, aten.slice.Tensor, (first.args[0], 0, 0, 2), first)
    with module.graph.inserting_before(first):
        new = insert(module.graph, aten.silu.default, (half,), first)
    first.replace_all_uses_with(new)
    module.graph.erase_node(first)
    with pytest.raises(VerifyError, match=r"node linear_1: it claims .*\[4, .* computes .*\[2, "):
        verifier.check_report(1, "broken-pass")


def test_a_value_that_changes_under_its_users_is_noticed(verified: Verified) -> None:
    module, verifier = verified
    producer = calls(module.graph, aten.layer_norm.default)[0]
    source: Any = producer.args[0]
    with module.graph.inserting_before(producer):
        wide = insert(module.graph, aten.to.dtype, (source, torch.float64), producer)
    producer.args = (wide, *producer.args[1:])
    producer.meta["val"] = value(producer).double()  # the users claim what they did
    with pytest.raises(VerifyError, match=r"claims float32.* computes float64") as caught:
        verifier.check_report(1, "broken-pass")
    assert producer.name not in str(caught.value).splitlines()[0]


def test_layouts_reach_the_views_that_depend_on_them(verified: Verified) -> None:
    module, verifier = verified
    graph = module.graph
    view = next(node for node in calls(graph, aten.reshape.default) if value(node).dim() == 3)
    source: Any = view.args[0]
    turned = source.args[0]
    view.target = aten.view.default
    verifier.check_report(1, "a-pass")
    assert turned.target is ATTENTION
    with graph.inserting_after(turned):
        copy = insert(graph, aten.clone.default, (turned,), turned)
        copy.kwargs = {"memory_format": torch.contiguous_format}
        copy.meta["val"] = value(turned).contiguous()
    replace_uses(turned, copy, keep=(copy,))
    with pytest.raises(VerifyError, match=r"it cannot run: .*view"):
        verifier.check_report(1, "broken-pass")


def test_one_is_not_true(verified: Verified) -> None:
    module, verifier = verified
    add = next(n for n in calls(module.graph, aten.add.Tensor) if n.args[1] == 1)
    add.args = (add.args[0], True)
    with pytest.raises(VerifyError, match="no change reported"):
        verifier.check_report(0, "a-pass")


def erase(graph: Graph) -> None:
    (dead,) = [node for node in graph.nodes if node.op == "call_function" and not node.users]
    graph.erase_node(dead)


def reorder(graph: Graph) -> None:
    made = [node for node in graph.nodes if node.op == "call_function"]
    first = next(node for node in made if node.next not in node.users)
    first.next.append(first)


def rename_slot(graph: Graph) -> None:
    write_cache(graph, output_slot("site", 0), calls(graph, aten.linear.default)[0])


def revalue(graph: Graph) -> None:
    node = calls(graph, aten.linear.default)[0]
    node.meta["val"] = value(node).clone()


def reargue(graph: Graph) -> None:
    node = calls(graph, aten.layer_norm.default)[0]
    node.args = (*node.args[:4], 1e-3)


@pytest.mark.parametrize("change", [reorder, rename_slot, revalue, reargue])
def test_a_change_that_is_not_reported_is_rejected(
    change: Callable[[Graph], None], verified: Verified
) -> None:
    module, verifier = verified
    verifier.check_report(0, "a-pass")
    change(module.graph)
    with pytest.raises(VerifyError, match=r"after a-pass, quiet-pass: .*no change reported"):
        verifier.check_report(0, "a-pass, quiet-pass")


def test_an_erased_node_that_is_not_reported_is_rejected(dense: Dense) -> None:
    module = clone(dense[0])
    first = calls(module.graph, aten.linear.default)[0]
    with module.graph.inserting_after(first):
        insert(module.graph, aten.neg.default, (first,), first)
    verifier = Verifier(module, dense[1], dense[2])
    erase(module.graph)
    with pytest.raises(VerifyError, match=r"no change reported.*erased or moved"):
        verifier.check_report(0, "quiet-pass")


def test_a_change_that_was_not_made_is_rejected(verified: Verified) -> None:
    module, verifier = verified
    node = calls(module.graph, aten.linear.default)[0]
    node.args = tuple(node.args)  # the same again is no change
    with pytest.raises(VerifyError, match="after idle-pass: 3 changes reported, but nothing"):
        verifier.check_report(3, "idle-pass")


def test_a_result_of_another_shape_is_rejected(verified: Verified) -> None:
    module, verifier = verified
    graph = module.graph
    (result,) = outputs(graph)
    assert isinstance(result, Node)
    with graph.inserting_before(graph.output_node()):
        half = insert(graph, aten.slice.Tensor, (result, 0, 0, 2), result)
    graph.output_node().args = ((half,),)
    with pytest.raises(VerifyError, match=r"result 0 is float32\[2, .* not float32\[4, "):
        verifier.check_report(1, "broken-pass")


def test_inputs_that_change_places_are_rejected(verified: Verified) -> None:
    module, verifier = verified
    first, second = module.graph.find_nodes(op="placeholder")[:2]
    second.append(first)
    with pytest.raises(VerifyError, match=f"node {second.name}: it was {first.name}"):
        verifier.check_report(1, "broken-pass")


def test_a_name_given_twice_is_rejected(verified: Verified) -> None:
    module, verifier = verified
    first, second = calls(module.graph, aten.linear.default)[:2]
    second.name = first.name
    second.args = (*second.args[:2],)
    with pytest.raises(VerifyError, match="its name is taken"):
        verifier.check_report(1, "broken-pass")
