"""Identify a model by its attention structure and its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from ditfastattn.passes.plan import Fingerprint
from ditfastattn.passes.sites import AttentionSite

_SAMPLES = 4096


def fingerprint(sites: Sequence[AttentionSite], static: Sequence[Tensor]) -> Fingerprint:
    """Return the fingerprint of a graph with ``sites`` over the ``static`` inputs.

    Of each parameter and buffer at most 4096 evenly spaced elements are hashed, with its shape, so
    that a model of any size takes seconds; a change to fewer elements may pass unseen.
    """
    structure = [
        (site.name, site.kind, site.heads, site.head_dim, len(site.frontier)) for site in sites
    ]
    digests = sorted(_digest(tensor) for tensor in static)
    dtypes = [tensor.dtype for tensor in static if tensor.is_floating_point() and tensor.dim() > 1]
    return Fingerprint(
        structure=_sha256(json.dumps(structure).encode()),
        weights=_sha256("".join(digests).encode()),
        dtype=str(max(set(dtypes), key=dtypes.count)).removeprefix("torch.") if dtypes else "none",
    )


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLES)].contiguous().cpu()
    header = f"{tuple(tensor.shape)} {tensor.dtype} ".encode()
    return _sha256(header + sample.view(torch.uint8).numpy().tobytes())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
