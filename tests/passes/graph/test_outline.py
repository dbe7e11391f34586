"""Regions together compute what the whole graph computes, and equal blocks have equal keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ditfastattn import CfgLayout, Strategy
from ditfastattn.passes.graph.ir import ATTENTION, aten, calls, clone, outputs
from ditfastattn.passes.graph.outline import outline
from ditfastattn.passes.graph.region import Region, freed_after
from ditfastattn.passes.graph.slots import read_slots, written_slots
from ditfastattn.passes.plan.step_program import unroll
from ditfastattn.passes.plan.strategies import strategies
from ditfastattn.passes.rewrites.pipeline import rewrite
from ditfastattn.passes.windows.lower_window_attention import WindowKernel, lower_window_attention
from ditfastattn.runtime.caches import Caches
from tests.helpers import (
    TINY_MODELS,
    TinyModel,
    capture_model,
    captured_once,
    flat_inputs,
    mixed_strategies,
    tiny_dit,
    tiny_sd3,
    uniform_strategies,
)

Edit = Callable[[GraphModule], None]


def variants(
    tiny: TinyModel, strategies: Sequence[Sequence[Strategy]]
) -> Iterator[tuple[GraphModule, list[Tensor]]]:
    """Yield each step's graph, windows lowered, and its inputs."""
    found = captured_once(tiny)
    program = unroll(strategies, found.graph, found.every)
    caches = Caches()
    for step, variant in enumerate(program.schedule):
        actions = program.variants[variant]
        module = rewrite(found.graph, found.every, actions, CfgLayout.COND_FIRST)
        reads, writes = read_slots(module.graph), written_slots(module.graph)
        lower_window_attention(module)
        read = caches.read(program.slots, step, reads, torch.device("cpu"), {})
        args = [*flat_inputs(tiny, step), *read]
        with torch.no_grad():
            returned = module(*args)
        kept = returned[len(returned) - len(writes) :]
        caches.write(program.slots, step, dict(zip(writes, kept, strict=True)))
        yield module, args


def run_regions(
    module: GraphModule, regions: Sequence[Region], args: Sequence[Tensor]
) -> list[Tensor]:
    """Run region by region, eagerly; values have the layouts that the graph claims."""
    graph = module.graph
    known: dict[Node, Tensor] = dict(zip(graph.find_nodes(op="placeholder"), args, strict=True))
    known |= {node: getattr(module, str(node.target)) for node in graph.find_nodes(op="get_attr")}
    for region in regions:
        with torch.no_grad():
            results = region.extract(module)(*(known[source] for source in region.inputs))
        for node, result in zip(region.outputs, results, strict=True):
            assert result.stride() == node.meta["val"].stride()
            known[node] = result
    return [known[result] for result in outputs(graph) if isinstance(result, Node)]


def dense_regions(tiny: TinyModel, edit: Edit = lambda module: None) -> tuple[Region, ...]:
    module = clone(captured_once(tiny).graph.module)
    edit(module)
    return outline(module, flat_inputs(tiny, 0))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", list(TINY_MODELS))
def test_regions_compute_bitwise_what_the_graph_computes(name: str, seed: int) -> None:
    tiny = TINY_MODELS[name]()
    for module, args in variants(tiny, mixed_strategies(captured_once(tiny).every, seed)):
        with torch.no_grad():
            expected = module(*args)
        regions = outline(module, args)
        module.graph.lint()
        assert len(regions) > 3
        got = run_regions(module, regions, args)
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", list(TINY_MODELS))
def test_regions_hold_every_call_once_in_an_order_that_runs(name: str) -> None:
    tiny = TINY_MODELS[name]()
    for module, args in variants(tiny, mixed_strategies(captured_once(tiny).every, 3)):
        regions = outline(module, args)
        members = [node for region in regions for node in region.nodes]
        assert len(set(members)) == len(members)
        assert set(members) == {n for n in module.graph.nodes if n.op == "call_function"}
        known = {n for n in module.graph.nodes if n.op in ("placeholder", "get_attr")}
        for region in regions:
            assert known.issuperset(region.inputs)
            known.update(region.outputs)


def test_equal_blocks_have_equal_keys() -> None:
    head, *blocks, table, conditioning, tail = dense_regions(tiny_dit())
    assert len(blocks) == 3 * 3  # conditioning, attention, feed-forward
    assert [r.key for r in blocks] == [r.key for r in blocks[:3]] * 3
    assert len({region.key for region in (head, *blocks[:3], table, conditioning, tail)}) == 7


def test_a_member_is_cut_where_its_residual_stream_alone_is_alive() -> None:
    _, conditioning, attention, feed_forward, *_ = dense_regions(tiny_dit())
    assert aten.embedding.default in {node.target for node in conditioning.nodes}
    assert ATTENTION in {node.target for node in attention.nodes}
    assert aten.gelu.default not in {node.target for node in attention.nodes}
    assert aten.gelu.default in {node.target for node in feed_forward.nodes}
    (stream,) = attention.outputs
    assert stream.target is aten.add.Tensor


def test_the_last_block_of_sd3_drops_its_text_and_differs() -> None:
    # Conditioning, joint attention, the image's feed-forward; the text's unless it is the last.
    _, *regions, _ = dense_regions(tiny_sd3())
    keys = [region.key for region in regions]
    assert keys[:4] == keys[4:8]
    assert len(keys[8:]) == 3
    assert {*keys[:4]}.isdisjoint(keys[8:10])


def test_a_neighbour_that_shares_guidance_changes_no_key() -> None:
    tiny = tiny_dit()
    full = Strategy.FULL
    halved = (full, full, Strategy.SHARE_CFG, full, full, full)  # attention, feed-forward, ...
    (module, args), *_ = variants(tiny, [halved])
    keys = [region.key for region in outline(module, args)]
    dense = [region.key for region in dense_regions(tiny)]
    conditioning, attention = 4, 5  # of the second block
    assert keys[conditioning] != dense[conditioning]  # half of it is used
    assert keys[attention] != dense[attention]
    del keys[conditioning : attention + 1], dense[conditioning : attention + 1]
    assert keys == dense


def test_every_strategy_has_its_own_key_in_every_block() -> None:
    tiny = tiny_dit()
    keys: dict[Strategy, str] = {}
    for strategy in strategies():
        *_, (module, args) = variants(tiny, uniform_strategies(captured_once(tiny).every, strategy))
        blocks = outline(module, args)[1:10]
        assert [r.key for r in blocks] == [r.key for r in blocks[:3]] * 3
        keys[strategy] = blocks[1].key  # of the attention
    # At the last step, as here, nothing reads a residual that would be refreshed.
    assert keys.pop(Strategy.SHARE_CFG_REFRESH) == keys[Strategy.SHARE_CFG]
    assert len(set(keys.values())) == len(strategies()) - 1


def change_constant(module: GraphModule) -> None:
    norm = calls(module.graph, aten.layer_norm.default)[0]
    norm.args = (*norm.args[:4], 1e-3)


def change_type_of_constant(module: GraphModule) -> None:
    added = next(n for n in calls(module.graph, aten.add.Tensor) if n.args[1] == 1)
    added.args = (added.args[0], 1.0)


def change_keyword(module: GraphModule) -> None:
    activation = calls(module.graph, aten.gelu.default)[0]
    activation.kwargs = {"approximate": "none"}


def change_operator(module: GraphModule) -> None:
    activation = calls(module.graph, aten.silu.default)[0]
    activation.target = aten.relu.default


def change_wiring(module: GraphModule) -> None:
    sums = [n for n in calls(module.graph, aten.add.Tensor) if len(n.all_input_nodes) == 2]
    in_first_block = sums[1]  # the first one adds the position code
    in_first_block.args = in_first_block.args[::-1]


@pytest.mark.parametrize(
    "edit",
    [change_constant, change_type_of_constant, change_keyword, change_operator, change_wiring],
)
def test_a_changed_block_gets_another_key(edit: Edit) -> None:
    keys = [region.key for region in dense_regions(tiny_dit(), edit)]
    first, second, third = keys[1:4], keys[4:7], keys[7:10]
    assert second == third
    assert first != second


def test_other_shapes_get_other_keys() -> None:
    tiny = tiny_dit()
    smaller = captured_once(tiny, batch=2)
    args = [node.meta["val"] for node in smaller.graph.module.graph.find_nodes(op="placeholder")]
    regions = outline(clone(smaller.graph.module), args)
    common = {r.key for r in regions} & {r.key for r in dense_regions(tiny)}
    assert len(common) == 1  # the frequencies of the timestep's embedding: a table


def test_other_strides_of_an_input_get_another_key_and_still_agree() -> None:
    tiny = tiny_dit()
    module = clone(captured_once(tiny).graph.module)
    args = flat_inputs(tiny, 0)
    position = next(i for i, item in enumerate(args) if item.dim() == 4 and item.shape[2] == 8)
    args[position] = args[position].contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = module(*args)
    regions = outline(module, args)
    assert regions[0].key != dense_regions(tiny)[0].key
    assert regions[1].key == dense_regions(tiny)[1].key
    assert torch.equal(run_regions(module, regions, args)[0], expected[0])


class FlexBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(x).view(1, 512, 3, 2, 16).permute(2, 0, 3, 1, 4)
        attended = torch.ops.ditfastattn.window_attention(*heads.unbind(0), 40, 0.25)
        merged: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return x + merged


def test_flex_attention_keeps_its_mask_inside_the_region() -> None:
    model = nn.Sequential(FlexBlock(), FlexBlock()).eval()
    captured = capture_model(model, {"input": torch.randn(1, 512, 32)})
    module = captured.module
    assert lower_window_attention(module, WindowKernel.FLEX) == []
    sizes = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    args = [torch.randn(size.shape) for size in sizes]
    with torch.no_grad():
        expected = module(*args)
    first, second = outline(module, args)
    assert first.key == second.key
    assert torch.equal(run_regions(module, (first, second), args)[0], expected[0])


def test_a_model_without_repeated_layers_is_one_region() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4)).eval()
    captured = capture_model(model, {"input": torch.randn(2, 4)})
    args = [node.meta["val"] for node in captured.module.graph.find_nodes(op="placeholder")]
    (region,) = outline(captured.module, args)
    assert len(region.nodes) == 3


def test_values_are_freed_after_their_last_use() -> None:
    tiny = tiny_dit()
    module, args = next(variants(tiny, mixed_strategies(captured_once(tiny).every, 1)))
    regions = outline(module, args)
    freed = freed_after(regions, module.graph)
    made = [node for region in regions for node in region.outputs]
    returned = {node for node in outputs(module.graph) if isinstance(node, Node)}
    assert sorted(n.name for group in freed for n in group) == sorted(
        n.name for n in made if n not in returned
    )
    for index, group in enumerate(freed):
        for node in group:
            assert node in regions[index].inputs
            assert all(node not in later.inputs for later in regions[index + 1 :])
