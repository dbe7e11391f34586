"""Check that passes leave a graph valid; a fault is a bug of ours and shows the lines around it.

A graph is valid if it is well formed, keeps the model's calling convention, computes everywhere the
shape, dtype and device that its metadata claims, writes nothing in place, and shares no memory
between its caches and what the caller holds: the model's inputs and results.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ditfastattn.core.errors import VerifyError
from ditfastattn.passes.graph.aliases import is_write, owners, shared_arguments
from ditfastattn.passes.graph.ir import graph_text, outputs
from ditfastattn.passes.graph.kinds import Kind, agree, claimed_kind, kind_of, kind_text, run_call
from ditfastattn.passes.graph.slots import Slot, read_nodes, read_slots, written_slots

_CONTEXT_LINES = 3

_Definition = tuple[Any, Any, Any, Any]  # what a node calls, on what, and the value it claims
_Order = tuple[list[Node], tuple[Any, ...]]  # the nodes, and the slots that are read and written


def verify(module: GraphModule, inputs: int, results: int, after: str) -> None:
    """Check all of ``module``; arguments and errors as of ``Verifier``."""
    Verifier(module, inputs, results, valid=False).check(after)


class Verifier:
    """Check a graph after each pass: what the pass changed, and what its changes reach."""

    def __init__(
        self, module: GraphModule, inputs: int, results: int, *, valid: bool = True
    ) -> None:
        """Take a graph before any pass.

        Args:
            module: the graph; it keeps the inputs and results that it has now.
            inputs: how many inputs the model itself has; cache inputs follow them.
            results: how many outputs the model itself has; cache outputs follow them.
            valid: whether all nodes are known to be valid, and need no check until they change.
        """
        self._module = module
        self._inputs = [(node.name, claimed_kind(node)) for node in _inputs(module.graph)[:inputs]]
        self._results = [_returned_kind(item) for item in outputs(module.graph)[:results]]
        self._counts = inputs, results
        self._known: dict[Node, _Definition] = {}
        self._kinds: dict[Node, Kind] = {}  # as computed, with the layouts that inputs really have
        self._order: _Order = [], ()
        if valid:
            self._remember(module.graph.nodes)

    def check_report(self, changed: int, after: str) -> None:
        """Check the graph, and that the last pass changed it if and only if it reported so.

        Raises:
            VerifyError: as ``check``; or the report is false.
        """
        altered = self._altered()
        differs = bool(altered) or self._order != _order(self._module.graph)
        if changed and not differs:
            raise VerifyError(f"after {after}: {changed} changes reported, but nothing changed")
        if differs and not changed:
            reason = "no change reported, but the graph changed"
            if not altered:
                raise VerifyError(f"after {after}: {reason}: nodes were erased or moved")
            raise _fault(self._module.graph, altered[0], after, reason)
        if differs:
            self._check(altered, after)

    def check(self, after: str) -> None:
        """Check what has changed since the last check.

        Args:
            after: the passes run so far, for the message.

        Raises:
            VerifyError: something does not hold.
        """
        self._check(self._altered(), after)

    def _check(self, altered: Sequence[Node], after: str) -> None:
        _check_form(self._module.graph, after)
        self._check_convention(after)
        self._check_values(set(altered), after)
        self._check_memory(after)
        self._remember(altered)

    def _altered(self) -> list[Node]:
        """Return the nodes that are new, or defined otherwise than at the last check."""
        known = self._known
        return [
            node
            for node in self._module.graph.nodes
            if node not in known or not _still_defined(node, known[node])
        ]

    def _remember(self, altered: Iterable[Node]) -> None:
        """Take the graph as valid; of its nodes only those ``altered`` are not known yet."""
        self._order = _order(self._module.graph)
        self._known.update((node, _definition(node)) for node in altered)
        for node in self._known.keys() - set(self._order[0]):
            del self._known[node]
            self._kinds.pop(node, None)

    def _check_convention(self, after: str) -> None:
        graph = self._module.graph
        inputs, results = self._counts
        _check_count("inputs", len(_inputs(graph)), inputs, read_slots(graph), after)
        _check_count("outputs", len(outputs(graph)), results, written_slots(graph), after)
        for node, (name, kind) in zip(_inputs(graph), self._inputs, strict=False):
            if node.name != name or not agree(claimed_kind(node), kind):
                raise _fault(graph, node, after, f"it was {name}, {kind_text(kind)}")
        for place, (item, kind) in enumerate(zip(outputs(graph), self._results, strict=False)):
            if not agree(_returned_kind(item), kind):
                reason = f"result {place} is {kind_text(_returned_kind(item))}, not "
                raise _fault(graph, graph.output_node(), after, reason + kind_text(kind))

    def _check_values(self, altered: Collection[Node], after: str) -> None:
        """Recompute what was altered, and its users as far as kinds change."""
        moved: set[Node] = set()
        for node in self._module.graph.nodes:
            reached = moved and not moved.isdisjoint(node.all_input_nodes)
            if node.op == "output" or not (reached or node in altered):
                continue
            before = self._kinds.get(node)
            if before is None and node in self._known:
                before = kind_of(self._known[node][-1])
            self._kinds[node] = self._check_node(node, after)
            if self._kinds[node] != before:
                moved.add(node)

    def _check_node(self, node: Node, after: str) -> Kind:
        """Return the kind of ``node``, computed from those of its inputs."""
        graph = self._module.graph
        if node.op == "get_attr" and not isinstance(_attribute(self._module, node), Tensor):
            return kind_of(None)  # the body of an operator of higher order
        if "val" not in node.meta:
            raise _fault(graph, node, after, "it carries no fake value")
        if is_write(node):
            raise _fault(graph, node, after, f"{node.target} writes in place")
        claimed = computed = claimed_kind(node)
        if node.op == "get_attr":
            computed = kind_of(_attribute(self._module, node))
        if node.op == "call_function":
            try:
                computed, _ = run_call(node, self._kind)
            except Exception as error:
                raise _fault(graph, node, after, f"it cannot run: {error}") from error
        if not agree(claimed, computed):
            reason = f"it claims {kind_text(claimed)} and computes {kind_text(computed)}"
            raise _fault(graph, node, after, reason)
        return computed

    def _kind(self, node: Node) -> Kind:
        if node not in self._kinds:
            self._kinds[node] = claimed_kind(node)
        return self._kinds[node]

    def _check_memory(self, after: str) -> None:
        """Refuse memory that a cache shares with what the caller may write to.

        The caller holds the model's inputs and results; caches are read and written besides.
        """
        graph = self._module.graph
        shared = functools.cache(lambda node: shared_arguments(node, self._kind))
        inputs, caches_read = set(_inputs(graph)), set(read_nodes(graph).values())
        _, count = self._counts
        returned = [
            owners(item, shared) if isinstance(item, Node) else frozenset()
            for item in outputs(graph)
        ]
        results = frozenset[Node]().union(*returned[:count])
        caches = frozenset[Node]().union(*returned[count:])
        for lent, reason in (
            (results & caches_read, "a result of the model is a view of this cache input"),
            (caches & inputs, "a cache output is a view of this input"),
            (caches & results, "a cache output and a result of the model share its memory"),
        ):
            for node in lent:
                raise _fault(graph, node, after, reason)


def _definition(node: Node) -> _Definition:
    return node.target, node.args, node.kwargs, node.meta.get("val")


def _still_defined(node: Node, known: _Definition) -> bool:
    target, args, kwargs, claimed = known
    return (
        claimed is node.meta.get("val")
        and target == node.target
        and _same(args, node.args)
        and _same(kwargs, node.kwargs)
    )


def _same(first: Any, second: Any) -> bool:
    """Tell whether two arguments are equal; 1, 1.0 and True are not."""
    if first is second:
        return True
    if type(first) is not type(second):
        return False
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[k], second[k]) for k in first)
    return bool(first == second)


def _order(graph: Graph) -> _Order:
    """Return the nodes in order, and the slots that the graph reads and writes."""
    return list(graph.nodes), (read_slots(graph), written_slots(graph))


def _inputs(graph: Graph) -> list[Node]:
    return list(graph.find_nodes(op="placeholder"))


def _returned_kind(item: Any) -> Kind:
    return claimed_kind(item) if isinstance(item, Node) else kind_of(item)


def _attribute(module: GraphModule, node: Node) -> Any:
    return functools.reduce(getattr, str(node.target).split("."), module)


def _check_form(graph: Graph, after: str) -> None:
    """Check that names are unique and that values are computed before they are used."""
    seen: set[Node] = set()
    names: set[str] = set()
    for node in graph.nodes:
        if not seen.issuperset(node.all_input_nodes):
            missing = next(source for source in node.all_input_nodes if source not in seen)
            reason = f"the graph is not well formed: {missing.name} is not computed before it"
            raise _fault(graph, node, after, reason)
        if node.name in names:
            raise _fault(graph, node, after, "the graph is not well formed: its name is taken")
        seen.add(node)
        names.add(node.name)


def _check_count(what: str, found: int, own: int, slots: Sequence[Slot], after: str) -> None:
    if found != own + len(slots) or len(set(slots)) != len(slots):
        named = ", ".join(map(str, slots))
        raise VerifyError(f"after {after}: {found} {what}, expected {own} and one each for {named}")


def _fault(graph: Graph, node: Node, after: str, reason: str) -> VerifyError:
    lines = graph_text(graph).splitlines()
    at = list(graph.nodes).index(node)
    shown = range(max(0, at - _CONTEXT_LINES), min(len(lines), at + _CONTEXT_LINES + 1))
    context = "\n".join(f"{'>' if line == at else ' '} {lines[line]}" for line in shown)
    return VerifyError(f"after {after}: node {node.name}: {reason}\n{context}")
