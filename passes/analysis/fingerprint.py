"""Identify a model by its attention structure, its weights and its LoRA adapters."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.fx import Node

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.records import Record
from ditfastattn.passes.analysis.site import Site
from ditfastattn.passes.capture.captured_graph import CapturedGraph
from ditfastattn.passes.capture.plain_tensors import parts, settings_of
from ditfastattn.passes.graph.ir import SCALINGS, aten

OPAQUE = "module:"  # begins the structure of a model whose inside is not captured
SAMPLES = 4096  # elements of each tensor that a plan's fingerprint covers
# PEFT: lora_A, lora_B, lora_embedding_A, lora_magnitude_vector; the scale, where adapters may be
# hot-swapped, is a tensor too.
_ADAPTER = re.compile(r"lora_|\.scaling\.")


class Fingerprint(Record, frozen=True):
    """Identify a model: its dtype, hashes of its attention structure and of its weights.

    ``weights`` leaves out LoRA adapters; ``lora`` covers them and their scale, "" where none acts.
    """

    structure: str
    weights: str
    dtype: str
    lora: str = ""


def fingerprint(
    captured: CapturedGraph,
    sites: Sequence[Site],
    static: Sequence[Tensor],
    samples: int = SAMPLES,
) -> Fingerprint:
    """Return the fingerprint of ``captured`` with ``sites`` over its ``static`` inputs, in order.

    About ``samples`` evenly spaced elements of each parameter and buffer are hashed, with its
    shape, so that a model of any size takes seconds; a change to other elements goes unnoticed.
    """
    structure = [
        (site.name, site.kind, site.heads, site.head_dim, len(site.exits)) for site in sites
    ]
    placeholders = captured.module.graph.find_nodes(op="placeholder")
    inputs = zip(captured.inputs, placeholders, strict=True)
    named = [(entry.name, node) for entry, node in inputs if entry.static]
    weights: list[Tensor] = []
    adapters: list[str] = []
    for (name, node), tensor in zip(named, static, strict=True):
        if _ADAPTER.search(name):
            adapters.append(f"{_digest(tensor, samples)} {_scaling(node)}")
        else:
            weights.append(tensor)
    return Fingerprint(
        structure=_sha256(json.dumps(structure).encode()),
        weights=hash_tensors(weights, samples),
        dtype=_main_dtype(weights),
        lora=_join(adapters) if adapters else "",
    )


def module_fingerprint(module: nn.Module, samples: int = SAMPLES) -> Fingerprint:
    """Return the fingerprint of a module whose inside is not captured.

    Its structure is that of its parameters and buffers; weights are hashed as in ``fingerprint``.

    Raises:
        ConfigError: the weights are not in memory.
    """
    if is_offloaded(module):
        raise ConfigError(
            "the transformer's weights are moved in part by part while it runs",
            where=type(module).__name__,
            expected="weights that can be compared with a plan's",
            remedy="calibrate first, and call enable_sequential_cpu_offload() then",
        )
    named = _tensors_of(module)
    plain = [item for name, item in named if not _ADAPTER.search(name)]
    adapters = [_digest(item, samples) for name, item in named if _ADAPTER.search(name)]
    return Fingerprint(
        structure=_structure(module, named),
        weights=hash_tensors(plain, samples),
        dtype=_main_dtype(plain),
        lora=_join(adapters) if adapters else "",
    )


def module_structure(module: nn.Module) -> str:
    """Return a hash of the names and shapes of parameters and buffers, and how these compute."""
    return _structure(module, _tensors_of(module))


def _structure(module: nn.Module, named: Sequence[tuple[str, Tensor]]) -> str:
    shapes = ((name, list(item.shape)) for name, item in named)
    weights = module.named_parameters()
    quantized = ((name, found) for name, item in weights if (found := settings_of(item)))
    return OPAQUE + _sha256(json.dumps([type(module).__name__, *shapes, *quantized]).encode())


def is_offloaded(module: nn.Module) -> bool:
    """Return whether weights of ``module`` are not in memory until a part of it runs."""
    return any(item.is_meta for item in (*module.parameters(), *module.buffers()))


def weights_of(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of ``module``, quantized ones as their plain parts."""
    return [item for _, item in _tensors_of(module)]


def _tensors_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    whole = [*module.named_parameters(), *module.named_buffers()]
    return [part for name, item in whole for part in parts(item, name)]


def _main_dtype(tensors: Sequence[Tensor]) -> str:
    dtypes = [tensor.dtype for tensor in tensors if tensor.is_floating_point() and tensor.dim() > 1]
    return str(max(set(dtypes), key=dtypes.count)).removeprefix("torch.") if dtypes else "none"


def hash_tensors(tensors: Iterable[Tensor], samples: int = SAMPLES) -> str:
    """Return a hash of about ``samples`` elements of each of ``tensors``, in any order."""
    return _join(_digest(tensor, samples) for tensor in tensors)


def _scaling(adapter: Node) -> list[str]:
    """Return the numbers that scale an adapter's branch before it is added to the base's output.

    Before::

        %3 = aten.linear.default(%x, %lora_A)
        %4 = aten.linear.default(%3, %lora_B)
        %5 = aten.mul.Tensor(%4, 2.0)
        %6 = aten.add.Tensor(%base, %5)

    After::

        ["aten.mul.Tensor 2.0"]
    """
    branch, pending = {adapter}, [adapter]
    scalings: list[str] = []
    while pending:
        for user in pending.pop().users:
            if user in branch or user.target is aten.add.Tensor:
                continue
            branch.add(user)
            pending.append(user)
            if user.target in SCALINGS:
                factors = (factor for factor in user.args if isinstance(factor, (int, float)))
                scalings += [f"{user.target} {float(factor)}" for factor in factors]
    return scalings


def _join(digests: Iterable[str]) -> str:
    return _sha256("".join(sorted(digests)).encode())


def _digest(tensor: Tensor, samples: int) -> str:
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // samples)].contiguous().cpu()
    header = f"{tuple(tensor.shape)} {tensor.dtype} ".encode()
    return _sha256(header + sample.view(torch.uint8).numpy().tobytes())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
