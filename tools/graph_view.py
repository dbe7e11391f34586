"""A step's graph before and after each pass: as text, as counts of operators, and drawn.

Drawn are not single operators, of which there are thousands, but parts: the calls of one module of
the model, and of each pass's own. A part that a pass has changed since the graph before is marked.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import networkx
from matplotlib.figure import Figure
from torch.fx import GraphModule, Node

from ditfastattn.core.files import make_folder, replacing, write_text_atomically
from ditfastattn.passes.analysis.flops import Flops, count_node
from ditfastattn.passes.graph.ir import graph_text
from ditfastattn.passes.graph.origin import module_path

_DEPTH = 3  # components of a module's path that name a part
_COLOURS = {"same": "#d5dbe0", "changed": "#e69f00", "new": "#56b4e9"}


@dataclass(frozen=True)
class Part:
    """The calls of one part of a model: how many of each operator, and their FLOPs."""

    operators: tuple[tuple[str, int], ...]
    flops: int


@dataclass(frozen=True)
class GraphView:
    """A graph after the pass ``name``: its text, its parts, and which part feeds which."""

    name: str
    text: str
    parts: dict[str, Part]
    edges: frozenset[tuple[str, str]]

    @property
    def operators(self) -> Counter[str]:
        """Return how many calls of each operator there are."""
        found: Counter[str] = Counter()
        for part in self.parts.values():
            found.update(dict(part.operators))
        return found


def view(name: str, module: GraphModule) -> GraphView:
    """Return the view of a graph."""
    members: dict[str, list[Node]] = {}
    part_of: dict[Node, str] = {}
    for node in module.graph.nodes:
        if node.op == "call_function":
            part_of[node] = _part(node)
            members.setdefault(part_of[node], []).append(node)
    edges = {
        (part_of[source], part)
        for node, part in part_of.items()
        for source in node.all_input_nodes
        if source in part_of and part_of[source] != part
    }
    parts = {part: _described(nodes) for part, nodes in members.items()}
    return GraphView(name, graph_text(module.graph), parts, frozenset(edges))


def changes(before: GraphView, after: GraphView) -> str:
    """Return in one line which operators a pass has added and removed."""
    counts = after.operators
    counts.subtract(before.operators)
    changed = [f"{count:+d} {name}" for name, count in sorted(counts.items()) if count]
    return ", ".join(changed) or "the same operators"


def write_views(views: Sequence[GraphView], folder: Path) -> list[Path]:
    """Write each graph as text and as SVG, numbered in order; return the files."""
    make_folder(folder)
    written: list[Path] = []
    for number, one in enumerate(views):
        text = folder / f"{number:02d}-{one.name}.txt"
        write_text_atomically(text, one.text + "\n")
        drawn = text.with_suffix(".svg")
        with replacing(drawn) as temporary:
            temporary.write_text(draw(one, views[number - 1] if number else one), encoding="utf-8")
        written += [text, drawn]
    return written


def draw(one: GraphView, before: GraphView) -> str:
    """Return ``one`` as SVG: a box per part, top to bottom by data flow, changed ones coloured."""
    graph = networkx.DiGraph()
    graph.add_nodes_from(one.parts)
    graph.add_edges_from(one.edges)
    ranks = _ranks(graph)
    rows = Counter(ranks.values())
    placed: Counter[int] = Counter()
    places: dict[str, tuple[float, float]] = {}
    for name in one.parts:
        row = ranks[name]
        places[name] = (placed[row] - (rows[row] - 1) / 2.0, -float(row))
        placed[row] += 1
    wide, high = max(rows.values(), default=1), max(ranks.values(), default=0) + 1
    figure = Figure(figsize=(3.2 * wide + 1.0, 0.62 * high + 1.0))
    axis = figure.subplots()
    axis.set_axis_off()
    axis.set_title(f"after {one.name}" if one is not before else one.name, fontsize=10)
    for source, target in one.edges:
        axis.annotate(
            "",
            places[target],
            places[source],
            arrowprops={"arrowstyle": "->", "color": "#8895a0", "shrinkA": 9, "shrinkB": 9},
        )
    for name, part in one.parts.items():
        calls = sum(count for _, count in part.operators)
        axis.text(
            *places[name],
            f"{name}\n{calls} calls, {part.flops / 1e6:.1f} MFLOPs",
            ha="center",
            va="center",
            fontsize=6.5,
            bbox={"boxstyle": "round", "facecolor": _COLOURS[_state(name, one, before)]},
        )
    axis.set_xlim(-wide / 2.0 - 0.1, wide / 2.0 + 0.1)
    axis.set_ylim(-high + 0.3, 0.7)
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text that can be searched
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def _ranks(graph: networkx.DiGraph[str]) -> dict[str, int]:
    """Return each part's row: parts that feed each other, as a loop of modules may, share one."""
    condensed = networkx.condensation(graph)
    found: dict[str, int] = {}
    for row, generation in enumerate(networkx.topological_generations(condensed)):
        for component in generation:
            for name in condensed.nodes[component]["members"]:
                found[name] = row
    return found


def _state(name: str, one: GraphView, before: GraphView) -> str:
    if name not in before.parts:
        return "new"
    return "same" if before.parts[name] == one.parts[name] else "changed"


def _part(node: Node) -> str:
    path = module_path(node)
    return ".".join(path.split(".")[:_DEPTH]) if path else "the model itself"


def _described(nodes: Sequence[Node]) -> Part:
    operators = Counter(str(node.target).removeprefix("aten.") for node in nodes)
    flops = sum((count_node(node) for node in nodes), Flops(0, 0)).total
    return Part(tuple(sorted(operators.items())), flops)
