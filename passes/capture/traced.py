"""Capture a call by running it: the second way, where Dynamo finds several graphs.

The model's code runs once on the real inputs, and each operator that it calls is recorded. What the
code reads of its inputs on the way decides what it calls next, so it holds for equal reads only:
*guards* say so. A read of what is denoised would give another graph at each step; the module that
reads stays whole then (``opaque_blocks``), or the model is refused, with the line that reads.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._dynamo.exc import TorchDynamoException
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.capture.captured_graph import CapturedGraph, GraphInput
from ditfastattn.passes.capture.dynamo import finish, refuse_autocast, share_mode
from ditfastattn.passes.capture.guards import Guards, descendants, guards_of
from ditfastattn.passes.capture.host_reads import SHAPES, VALUES, HostReads
from ditfastattn.passes.capture.module_calls import following
from ditfastattn.passes.capture.plain_tensors import parts, path_names, rebuilt
from ditfastattn.passes.graph.ir import calls, constant_tensors
from ditfastattn.passes.graph.lazy_code import traced_lazily
from ditfastattn.passes.graph.origin import mark_static, readable_path

_Read = tuple[Node, str, str]
_REGISTERED = frozenset(vars(nn.Module()))  # parameters, buffers, parts and hooks
_COMPILED = "using FX to symbolically trace a dynamo-optimized function"  # in torch's error


@dataclass(frozen=True, eq=False)
class TracedCall:
    """Hold the graph of a call, what it takes for granted, and how results are put together.

    Attributes:
        kept: which of the flat inputs (``flat_tensors``) the graph takes.
        guards: over all flat inputs.
        opaque: why modules stayed whole: the line that reads, by the path of the module.
    """

    captured: CapturedGraph
    kept: tuple[int, ...]
    guards: Guards
    opaque: Mapping[str, str]
    results: tuple[Any, ...]
    structure: Any

    def inputs_of(self, flat: Sequence[Tensor]) -> list[Tensor]:
        """Return the inputs of the graph among the flat inputs of a call."""
        return [flat[index] for index in self.kept]

    def returned(self, results: Sequence[Any]) -> Any:
        """Return what the model returns, from what the graph has returned."""
        made = iter(results)
        leaves = [next(made) if held is None else held[0] for held in self.results]
        return pytree.tree_unflatten(leaves, self.structure)


def flat_tensors(module: nn.Module, arguments: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors of ``module``, then those of a call's ``arguments``, as graphs do."""
    return [tensor for _, tensor, _ in _flat(module, arguments)]


def _flat(module: nn.Module, arguments: Mapping[str, Any]) -> list[tuple[str, Tensor, bool]]:
    """Return name and tensor of each flat input, and whether it is static."""
    own = [*module.named_parameters(), *module.named_buffers(), *held_tensors(module)]
    found = [
        (readable_path(key), item, True) for name, item in own for key, item in parts(item, name)
    ]
    leaves, _ = pytree.tree_flatten_with_path(dict(arguments))
    for path, leaf in leaves:
        if isinstance(leaf, Tensor):
            found += [(key, item, False) for key, item in parts(leaf, ".".join(path_names(path)))]
    return found


def trace(
    forward: Callable[..., Any],
    module: nn.Module,
    arguments: Mapping[str, Any],
    varying: Callable[[CapturedGraph], Sequence[int]],
) -> TracedCall:
    """Capture ``forward(**arguments)``, the forward of ``module``.

    ``varying`` says which inputs change from step to step: the latent and the timestep.

    Raises:
        ConfigError: the model reads what changes from step to step, outside of any module that
            could stay whole; it writes to an input; or autocast is on.
    """
    opaque: dict[str, str] = {}
    with torch.no_grad():
        forward(**arguments)  # it makes tables of positions, say, that later calls find
    while True:
        try:
            return _Trace(forward, module, arguments, opaque).capture(varying)
        except _MustStayWhole as read:
            opaque |= read.modules


def held_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the tensors that ``module`` keeps beside parameters and buffers, by name."""
    found: list[tuple[str, Tensor]] = []
    for path, part in module.named_modules():
        for name, item in vars(part).items():
            if name not in _REGISTERED:
                found += _tensors(f"{path}.{name}" if path else name, item)
    return found


def _tensors(name: str, item: Any) -> list[tuple[str, Tensor]]:
    if isinstance(item, Tensor):
        return [(name, item)]
    if isinstance(item, dict):
        return [one for key, part in item.items() for one in _tensors(f"{name}.{key}", part)]
    if isinstance(item, (list, tuple)):
        return [one for index, part in enumerate(item) for one in _tensors(f"{name}.{index}", part)]
    return []


class _MustStayWhole(Exception):  # noqa: N818  # it ends a trace and reports no error
    def __init__(self, modules: Mapping[str, str]) -> None:
        self.modules = dict(modules)


class _Trace:
    """One run of the model's code."""

    def __init__(
        self,
        forward: Callable[..., Any],
        module: nn.Module,
        arguments: Mapping[str, Any],
        opaque: Mapping[str, str],
    ) -> None:
        flat = _flat(module, arguments)
        self._tensors = [tensor for _, tensor, _ in flat]
        self._inputs = [GraphInput(name, static) for name, _, static in flat]
        refuse_autocast(self._tensors)
        self._forward, self._module, self._opaque = forward, module, opaque
        self._leaves, self._structure = pytree.tree_flatten(dict(arguments))
        self._returned: tuple[tuple[Any, ...], Any] = (), None
        self._reads = HostReads()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def capture(self, varying: Callable[[CapturedGraph], Sequence[int]]) -> TracedCall:
        """Return the graph; raise ``_MustStayWhole`` where modules read what changes."""
        traced = self._run()
        nodes = traced.graph.find_nodes(op="placeholder")
        for entry, node in zip(self._inputs, nodes, strict=True):
            if entry.static:
                mark_static(node)
        used = [bool(node.users) for node in nodes]  # as Dynamo counts them
        for node in calls(traced.graph, torch._C._set_grad_enabled):
            traced.graph.erase_node(node)
        share_mode(traced, self._mode)
        whole = CapturedGraph(traced, tuple(self._inputs))
        unrecognized = finish(traced, lambda: self._bake(traced, varying(whole)))
        kept = [i for i, entry in enumerate(self._inputs) if used[i] or not entry.static]
        for index in set(range(len(nodes))) - set(kept):
            traced.graph.erase_node(nodes[index])
        traced.recompile()
        captured = CapturedGraph(traced, tuple(self._inputs[i] for i in kept), unrecognized)
        return TracedCall(captured, tuple(kept), self._guards, dict(self._opaque), *self._returned)

    def _run(self) -> GraphModule:
        """Run the model's code and record it."""
        # A tensor that is given twice need not be the same the next time.
        first = {id(item): place for place, item in reversed(list(enumerate(self._tensors)))}
        apart = [
            item if first[id(item)] == place else item.detach()
            for place, item in enumerate(self._tensors)
        ]

        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            given = iter(tensors)
            own = [*self._module.named_parameters(), *self._module.named_buffers()]
            made = {name: rebuilt(item, given) for name, item in own}
            for _ in held_tensors(self._module):
                next(given)
            changed = {name: made[name] for name, item in own if made[name] is not item}
            leaves = [rebuilt(i, given) if isinstance(i, Tensor) else i for i in self._leaves]
            arguments = pytree.tree_unflatten(leaves, self._structure)
            with _reparametrize_module(self._module, changed) if changed else ExitStack():
                result = self._forward(**arguments)
            results, structure = pytree.tree_flatten(result)
            held = tuple(None if isinstance(item, Tensor) else (item,) for item in results)
            self._returned = held, structure
            return tuple(item for item in results if isinstance(item, Tensor))

        with (
            torch.no_grad(),
            traced_lazily(),
            _own_compilation_refused(),
            tracing(TracingContext(self._mode)),  # else each value has a mode of its own
            self._reads,
            following(self._module, self._opaque),
        ):
            traced: GraphModule = make_fx(
                call,
                decomposition_table=self._reads.decompositions,
                pre_dispatch=True,
                _error_on_data_dependent_ops=False,
            )(*apart)
        if any(map(is_functorch_wrapped_tensor, constant_tensors(traced))):
            raise ConfigError(
                "the model maps a function over positions while it runs, as block masks of "
                "FlexAttention are made",
                where="a call of the transformer",
                got="torch.vmap",
                expected="operators on tensors",
                remedy="plan whole steps: calibrate(method='whole-steps'), which calls the model "
                "as it is",
            )
        return traced

    def _bake(self, traced: GraphModule, varying: Sequence[int]) -> None:
        """Make constants of what was read, with guards; note modules that must stay whole."""
        nodes = traced.graph.find_nodes(op="placeholder")
        reads = list(self._found(traced))
        moving = {nodes[index] for index in varying}
        moved = descendants(moving)
        whole = {_path(node): f"{what} ({line})" for node, what, line in reads if node in moved}
        if "" in whole:
            raise _refused(whole[""])
        if whole:
            raise _MustStayWhole(whole)
        values = guards_of(traced, self._inputs, reads).learn(self._tensors)
        given = descendants(nodes)
        self._guards = guards_of(traced, self._inputs, [read for read in reads if read[0] in given])
        self._guards.learn(self._tensors)
        baked = dict(zip(dict.fromkeys(node for node, _, _ in reads), values, strict=True))
        for node, _, _ in reads:
            if node.target in SHAPES and node in baked:
                _replace(traced, node, baked.pop(node))
        for node in calls(traced.graph, *VALUES):
            if not node.users:
                traced.graph.erase_node(node)

    def _found(self, traced: GraphModule) -> Generator[_Read]:
        """Yield what was read in the order of the graph: a node, what reads it, and the line."""
        by_python: dict[Node, tuple[str, str]] = {}
        for node, what, line in self._reads.read:
            by_python.setdefault(node, (what, line))
        for node in traced.graph.nodes:
            if node in by_python:
                yield node, *by_python[node]
            if node.target in (*VALUES, *SHAPES):
                sources = node.all_input_nodes
                line = next(
                    (
                        self._reads.lines[node.target, source]
                        for source in sources
                        if (node.target, source) in self._reads.lines
                    ),
                    "",
                )
                what = f"{node.target.overloadpacket.__name__.strip('_')}()"
                for source in [node] if node.target in SHAPES else sources:
                    yield source, what, line


@contextmanager
def _own_compilation_refused() -> Generator[None]:
    try:
        yield
    except (TorchDynamoException, RuntimeError) as error:
        if not isinstance(error, TorchDynamoException) and _COMPILED not in str(error):
            raise
        raise ConfigError(
            "a part of the model is compiled while it runs, as FlexAttention and its masks are",
            where="a call of the transformer",
            got=type(error).__name__,
            expected="operators on tensors",
            remedy="plan whole steps: calibrate(method='whole-steps')",
        ) from error


def _replace(module: GraphModule, node: Node, content: Tensor) -> None:
    name = f"_read_{len(module.graph.find_nodes(op='get_attr'))}"
    while hasattr(module, name):
        name += "_"
    module.register_buffer(name, content)
    with module.graph.inserting_before(node):
        held = module.graph.get_attr(name)
    held.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(held)
    module.graph.erase_node(node)


def _path(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack), "")


def _refused(line: str) -> ConfigError:
    return ConfigError(
        "the model's control flow depends on what it denoises, or on the timestep",
        where="a call of the transformer",
        got=line,
        expected="one graph for all steps",
        remedy="plan whole steps: calibrate(method='whole-steps'), which calls the model as it is",
    )
