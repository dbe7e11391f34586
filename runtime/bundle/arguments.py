"""The arguments of an exported model: bound by name, and checked against the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.bundle.manifest import Manifest
from ditfastattn.runtime.bundle.settings import check_settings
from ditfastattn.runtime.bundle.specs import Multiple, TensorSpec
from ditfastattn.runtime.pipeline.text_padding import TextPadder

_LARGEST_LATENT: Final = 1e15  # norms square them, and sum the squares


class BundleArguments:
    """Turn the arguments of the exported model's forward into the inputs of a bundle's graphs."""

    def __init__(self, manifest: Manifest, device: torch.device) -> None:
        """Take the manifest that describes them, and the device that they are moved to."""
        self._manifest, self._device = manifest, device
        self._pad = TextPadder([manifest.text]) if manifest.text else dict

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name, as the model's forward would take them.

        Raises:
            ConfigError: the forward has no such argument, one is given twice, or one that is no
                tensor is not as it was exported.
        """
        names = self._manifest.model.parameters
        if len(args) > len(names):
            raise ConfigError("too many arguments", got=len(args), expected=", ".join(names))
        given = dict(zip(names, args, strict=False))
        unknown = sorted((set(kwargs) - set(names)) | (set(kwargs) & set(given)))
        if unknown:
            raise ConfigError(
                "unknown or repeated arguments", got=", ".join(unknown), expected=", ".join(names)
            )
        given |= kwargs
        self.check_settings(given)
        return self._pad(given)

    def check_settings(self, given: Mapping[str, Any]) -> None:
        """Refuse other numbers, texts and flags than the exported call's; see ``settings``."""
        settings = self._manifest.model.settings
        if settings is not None:  # older bundles do not know
            check_settings(settings, given)

    def batch(self, given: Mapping[str, Any]) -> int:
        """Return the batch of a call that was bound as ``given``.

        Where some steps have one half of a guided step's batch, this may be that.

        Raises:
            ConfigError: the bundle does not take this batch.
        """
        manifest = self._manifest
        spec = _batched(manifest)
        shape = argument_named(spec.name, given).shape
        batch = shape[0] if shape else 0
        if not batch:
            raise ConfigError(
                "the batch is empty",
                where=f"argument {spec.name!r}",
                got=f"a tensor of shape {list(shape)}",
                expected="at least one row",
            )
        if manifest.fixed_batch and batch != manifest.fixed_batch:
            raise ConfigError(
                "the bundle was exported for another batch",
                where=f"argument {spec.name!r}",
                got=batch,
                expected=manifest.fixed_batch,
                remedy="export it with a free batch",
            )
        self.check_multiple(batch, manifest.batch_multiple // (2 if manifest.halved else 1))
        return batch

    def check_multiple(self, batch: int, multiple: int) -> None:
        """Refuse a batch that is not a multiple of ``multiple``."""
        if batch % multiple:
            raise ConfigError(
                "the batch does not hold both halves of guidance",
                where=f"argument {_batched(self._manifest).name!r}",
                got=batch,
                expected=f"a multiple of {multiple}",
            )

    def tensors(
        self, specs: Iterable[TensorSpec], given: Mapping[str, Any], batch: int
    ) -> dict[str, Tensor]:
        """Return the tensors that ``specs`` describe, by name, out of the arguments ``given``.

        Raises:
            ConfigError: one is missing, or has another shape or dtype.
        """
        return {spec.name: _tensor(spec, given, batch, self._device) for spec in specs}


def _batched(manifest: Manifest) -> TensorSpec:
    """Return an input whose first dimension is the batch."""
    whole, fixed = Multiple(numerator=1, denominator=1), manifest.fixed_batch
    shaped = [spec for spec in manifest.inputs if spec.shape]
    rows = [spec for spec in shaped if spec.shape[0] == whole or spec.shape[0] == fixed]
    latents = [spec for spec in rows if spec.name == manifest.latent]
    return [*latents, *rows, *shaped][0]


def check_range(name: str, latent: Tensor) -> None:
    """Refuse latents whose squares overflow: there runtimes and torch compute different things.

    It is not asked on a GPU, which would have to be waited for.

    Raises:
        ConfigError: they are that large.
    """
    if latent.device.type != "cpu":
        return
    largest = float(latent.abs().max())
    if largest > _LARGEST_LATENT:
        raise ConfigError(
            "the latents are too large to be computed with",
            where=f"argument {name!r}",
            got=f"{largest:g}",
            expected=f"at most {_LARGEST_LATENT:g}; noise is about 1",
        )


def argument_named(name: str, given: Mapping[str, Any]) -> Any:
    """Return the argument called ``name``: ``conditions.mask`` lies in the dict ``conditions``.

    Raises:
        ConfigError: there is no such tensor.
    """
    found: Any = given
    for part in name.split("."):
        try:
            found = found[_key(part, found)]
        except (KeyError, IndexError, TypeError, ValueError):
            found = None
    if not isinstance(found, Tensor):
        raise ConfigError(
            "a tensor argument of the model is missing",
            where=f"argument {name!r}",
            got=type(found).__name__,
            expected="what the model was exported with",
        )
    return found


def _key(part: str, holder: Any) -> int | str:
    """Return ``part`` of a name as ``holder``, a list or a dict, knows it."""
    numbered = part not in holder if isinstance(holder, dict) else True
    return int(part) if numbered and part.isdigit() else part


def as_pairs(tensor: Tensor) -> Tensor:
    """Return complex numbers as pairs of real ones, ``[..., 2]``; other tensors as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _tensor(spec: TensorSpec, given: Mapping[str, Any], batch: int, device: torch.device) -> Tensor:
    tensor: Tensor = argument_named(spec.name, given)
    if spec.pairs:
        tensor = as_pairs(tensor)
    expected = spec.sizes(batch)
    if tuple(tensor.shape) != expected:
        if not tensor.dim():
            raise ConfigError(
                "the argument is one value for all images",
                where=f"argument {spec.name!r}",
                got="a tensor without dimensions",
                expected=f"a tensor of shape {list(expected)}",
                remedy=f"give {spec.name}.expand({batch}), as the model itself takes it",
            )
        raise ConfigError(
            "the bundle is for another shape: a resolution or length is fixed at export",
            where=f"argument {spec.name!r}",
            got=list(tensor.shape),
            expected=list(expected),
            remedy="export a bundle for this shape",
        )
    dtype = spec.torch_dtype
    if tensor.dtype != dtype:
        if tensor.is_floating_point() != dtype.is_floating_point and not _is_timestep(tensor):
            raise ConfigError(
                "the argument has another dtype",
                where=f"argument {spec.name!r}",
                got=tensor.dtype,
                expected=dtype,
            )
        tensor = tensor.to(dtype)
    return tensor.to(device)


def _is_timestep(tensor: Tensor) -> bool:
    """Return whether a tensor may be a timestep, which schedulers give as integers or floats."""
    return tensor.dim() <= 1
