"""Capture a ``torch.export`` program: the same graph that Dynamo gives for the same call.

    program = torch.export.export(model, (), call)
    captured = capture_exported(program)
    sites = find_sites(captured).sites
    module = rewrite(captured, sites, actions, layout)

The model's own tensors (parameters, buffers, others) become static inputs under their names where
the graph uses them. Tensors that ``forward`` creates, and torch.export lifts, become constants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.capture.captured_graph import CapturedGraph, GraphInput
from ditfastattn.passes.capture.dynamo import capture
from ditfastattn.passes.capture.plain_tensors import path_names, plain_tensors
from ditfastattn.passes.graph.ir import aten, calls, clone
from ditfastattn.passes.graph.origin import mark_static

_WHERE = "the exported program"
_HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_CHECKS = (aten._assert_tensor_metadata.default,)  # always true in a graph of fixed shapes
_KNOWN = (*_HELD, InputKind.USER_INPUT)
_LIFTED = "lifted_tensor_"  # torch.export's name for tensors that no module holds


def capture_exported(program: ExportedProgram) -> CapturedGraph:
    """Return the graph of ``program`` at the shapes of its example inputs.

    Keyword arguments keep their names, as with Dynamo, so that a plan made with either is accepted
    by the other if the example inputs were given by keyword.

    Raises:
        ConfigError: the program holds no example inputs, has effects beside its results, or its
            shapes depend on data.
    """
    _check_signature(program)
    flat = flat_inputs(program, *_example_inputs(program))
    inputs = _names(program)
    return capture(_prepared(program.graph_module, inputs), inputs, flat, _constants(program))


def flat_inputs(
    program: ExportedProgram, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Any]:
    """Return what each placeholder of ``program`` gets when it is called with these arguments.

    Raises:
        ConfigError: the arguments do not have the structure of the export, or one that is not a
            tensor has another value.
    """
    leaves, structure = pytree.tree_flatten(_ordered(program, args, kwargs))
    if structure != program.call_spec.in_spec:
        raise ConfigError(
            "the arguments do not have the structure of the export",
            where=_WHERE,
            got=structure,
            expected=program.call_spec.in_spec,
        )
    examples = pytree.tree_leaves(_example_inputs(program))
    for leaf, example in zip(leaves, examples, strict=True):
        _check_constant(leaf, example)
    users = iter(leaves)
    return [_held(program, spec, users) for spec in program.graph_signature.input_specs]


def flat_tensors(
    program: ExportedProgram, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Tensor]:
    """Return the inputs of the captured graph, in its order; errors as in ``flat_inputs``."""
    constants = _constants(program)
    flat = enumerate(flat_inputs(program, args, kwargs))
    return plain_tensors(item for index, item in flat if index not in constants)


def _ordered(program: ExportedProgram, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the arguments, those by keyword in the order of the export."""
    structure: Any = program.call_spec.in_spec  # of every program that torch.export makes
    order = structure.child(1).context
    first = {name: kwargs[name] for name in order if name in kwargs}
    return tuple(args), first | dict(kwargs)


def _check_constant(leaf: Any, example: Any) -> None:
    """Refuse a number or flag that differs from the constant of the program."""
    kinds = isinstance(leaf, Tensor), isinstance(example, Tensor)
    if all(kinds) or (not any(kinds) and leaf == example):
        return
    raise ConfigError(
        "an argument that is not a tensor is a constant of the program",
        where=_WHERE,
        got=type(leaf).__name__ if kinds[0] else leaf,
        expected=type(example).__name__ if kinds[1] else example,
        remedy="export it with this value",
    )


def _held(program: ExportedProgram, spec: InputSpec, users: Any) -> Any:
    """Return the tensor that ``program`` holds for an input, or the next of the call's own."""
    if spec.kind is InputKind.USER_INPUT:
        return next(users)
    held = program.state_dict if spec.target in program.state_dict else program.constants
    return held[str(spec.target)]


def _example_inputs(program: ExportedProgram) -> Any:
    if program.example_inputs is None:
        raise ConfigError(
            "the program holds no example inputs",
            where=_WHERE,
            remedy="export it again, or set program.example_inputs = (args, kwargs) on it",
        )
    return _ordered(program, *program.example_inputs)


def _check_signature(program: ExportedProgram) -> None:
    signature = program.graph_signature
    effects = [out for out in signature.output_specs if out.kind is not OutputKind.USER_OUTPUT]
    unknown = [spec for spec in signature.input_specs if spec.kind not in _KNOWN]
    for spec in (*effects, *unknown):
        raise ConfigError(
            "the program has effects other than its results, so its steps cannot be rewritten",
            where=_WHERE,
            got=f"{spec.kind.name.lower()} {spec.target or ''}".strip(),
            expected="parameters, buffers and arguments in, results out",
            remedy="use the out-of-place form of this operation in the model",
        )


def _names(program: ExportedProgram) -> list[GraphInput]:
    leaves, _ = pytree.tree_flatten_with_path(_example_inputs(program))
    paths = iter(path for path, _ in leaves)
    placeholders = program.graph.find_nodes(op="placeholder")
    found = []
    for spec, node in zip(program.graph_signature.input_specs, placeholders, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            found.append(GraphInput(_argument(next(paths), node.name), static=False))
        else:
            found.append(GraphInput(str(spec.target), static=True))
    return found


def _argument(path: Sequence[Any], name: str) -> str:
    """Return a keyword argument's name and keys, or torch.export's ``name`` of a positional one."""
    keys = path_names(path)
    return ".".join(keys[1:]) if keys[0] == "1" else name


def _constants(program: ExportedProgram) -> frozenset[int]:
    """Return which placeholders are not inputs of the captured graph."""
    specs = program.graph_signature.input_specs
    placeholders = program.graph.find_nodes(op="placeholder")
    return frozenset(
        index
        for index, (spec, node) in enumerate(zip(specs, placeholders, strict=True))
        if spec.kind in _HELD and (not node.users or _is_lifted(spec))
    )


def _is_lifted(spec: InputSpec) -> bool:
    return str(spec.target).rpartition(".")[2].startswith(_LIFTED)


def _prepared(module: GraphModule, inputs: Sequence[GraphInput]) -> GraphModule:
    """Return a copy without torch.export's assertions, its static inputs marked as Dynamo does."""
    copy = clone(module)
    for entry, node in zip(inputs, copy.graph.find_nodes(op="placeholder"), strict=True):
        if entry.static:
            mark_static(node)
    for target in _CHECKS:
        for node in calls(copy.graph, target):
            copy.graph.erase_node(node)
    copy.recompile()
    return copy
