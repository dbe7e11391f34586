"""Find the latent among a model's inputs: the one that is denoised."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.graph.ir import aten, value

_PROJECTIONS = (
    aten.linear.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.matmul.default,
    aten.mm.default,
)


def latent_position(captured: CapturedGraph) -> int | None:
    """Return which flat input is the latent; None if no input has the output's size."""
    return next(iter(latent_candidates(captured)), None)


def latent_candidates(captured: CapturedGraph) -> tuple[int, ...]:
    """Return the flat inputs that may be the latent, where they cannot be told apart; often one.

    The latent has the rank and size of the output. So may masks and conditioning images have; but
    the latent has the output's batch, is projected to tokens, where a mask is only multiplied with
    those, and has the output's channels, or half as many where the model predicts variances too.
    A model of several outputs, as of a list of images, has candidates for each.
    """
    returned = captured.module.graph.output_node().all_input_nodes
    returned = [node for node in returned if node.op != "placeholder"]  # such as given caches
    dynamic = _dynamic(captured)
    found = [_candidates(captured, value(node), dynamic) for node in returned if _is_tensor(node)]
    return tuple(dict.fromkeys(index for each in found for index in each))


def is_listed(name: str) -> bool:
    """Return whether the input ``name`` is one of a list: then an image is not a row of a batch."""
    return name.rpartition(".")[2].isdigit()


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _candidates(captured: CapturedGraph, output: Tensor, dynamic: set[Node]) -> tuple[int, ...]:
    placeholders = captured.module.graph.find_nodes(op="placeholder")
    ranked = [
        (_likeness(node, output, dynamic), index)
        for index, (entry, node) in enumerate(zip(captured.inputs, placeholders, strict=True))
        if not entry.static and _has_size(value(node), output)
    ]
    best = max((likeness for likeness, _ in ranked), default=None)
    return tuple(index for likeness, index in ranked if likeness == best)


def _has_size(tensor: Tensor, output: Tensor) -> bool:
    first_size = 2 if output.dim() > 3 else 1  # after the channels, where they come second
    return (
        tensor.is_floating_point()
        and tensor.dim() == output.dim() > 1
        and tensor.shape[first_size:] == output.shape[first_size:]
    )


def _likeness(node: Node, output: Tensor, dynamic: set[Node]) -> tuple[bool, bool, int]:
    """Return how much the input ``node`` is like a latent; the first difference decides."""
    tensor = value(node)
    channels = 2 * (tensor.shape == output.shape) + (2 * tensor.shape[1] == output.shape[1])
    return tensor.shape[0] == output.shape[0], _is_projected(node, dynamic), channels


def _dynamic(captured: CapturedGraph) -> set[Node]:
    """Return the nodes that depend on an argument of the call."""
    placeholders = captured.module.graph.find_nodes(op="placeholder")
    pairs = zip(captured.inputs, placeholders, strict=True)
    found = {node for entry, node in pairs if not entry.static}
    for node in captured.module.graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _is_projected(node: Node, dynamic: set[Node]) -> bool:
    """Return whether ``node`` reaches a projection as what is projected.

    On the way it may be scaled, or joined with others along an axis; where it is combined with
    something at least as large, it is followed no further.
    """
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        for user in current.users:
            others = [n for n in user.all_input_nodes if n is not current and n in dynamic]
            if user.target in _PROJECTIONS and not others:
                return True
            if user in seen or user.op != "call_function" or not _carries(user, current, others):
                continue
            seen.add(user)
            pending.append(user)
    return False


def _carries(user: Node, current: Node, others: list[Node]) -> bool:
    """Return whether ``user`` hands on ``current``, and not mainly something else."""
    if user.target in _PROJECTIONS:
        return False
    joins = user.target is aten.cat.default
    return joins or all(_elements(other) < _elements(current) for other in others)


def _elements(node: Node) -> int:
    result = node.meta["val"]
    leaves = result if isinstance(result, (tuple, list)) else [result]
    return sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor))
