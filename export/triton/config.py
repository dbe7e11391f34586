"""A model's ``config.pbtxt``, by the messages that Triton's client package defines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

from ditfastattn.core.errors import ConfigError
from ditfastattn.export.triton.graph import Ports
from ditfastattn.export.triton.options import TritonOptions, messages
from ditfastattn.runtime.bundle.manifest import Manifest
from ditfastattn.runtime.bundle.specs import TensorSpec

CONFIG_FILE: Final = "config.pbtxt"

_WINDOW: Final = 10_000  # microseconds that a request waits for others, as ``ditfastattn serve``
_QUEUE: Final = 64  # requests that may wait
_TYPES: Final = {"float": "FP", "bfloat": "BF", "int": "INT", "uint": "UINT"}


def config_of(name: str, ports: Ports, manifest: Manifest, options: TritonOptions) -> Any:
    """Return the configuration of the model ``name``, a ``ModelConfig``."""
    config = messages()[0].ModelConfig(
        name=name,
        backend=options.backend,
        max_batch_size=options.images if ports.joinable else 0,
    )
    for spec in ports.inputs:
        _declare(config.input.add(), spec, ports.joinable)
    _declare(config.output.add(), ports.latents, ports.joinable)
    config.instance_group.add(kind="KIND_AUTO", count=1)  # a generation takes the whole device
    if ports.joinable:
        config.dynamic_batching.max_queue_delay_microseconds = _WINDOW
        config.dynamic_batching.default_queue_policy.max_queue_size = _QUEUE
    warm_up = config.model_warmup.add(name="one image", batch_size=1)
    for spec in ports.inputs:
        given = warm_up.inputs[spec.name]
        given.data_type = _type(spec)
        sizes = spec.sizes(1 if ports.joinable else _least_batch(manifest))
        given.dims.extend(sizes[1 if ports.joinable else 0 :] or [1])
        given.zero_data = True  # an index of a class or a token, and a mask, too
    return config


def text_of(config: Any) -> str:
    """Return ``config`` as ``config.pbtxt`` has it."""
    text: str = messages()[1].MessageToString(config)
    return text


def read_config(path: Path) -> Any:
    """Return the configuration in ``path``.

    Raises:
        ConfigError: it is not one.
    """
    model_config, text_format = messages()
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), model_config.ModelConfig())
    except (OSError, ValueError, text_format.ParseError) as error:
        raise ConfigError(
            "this is not the configuration of a Triton model",
            where=str(path),
            got=error,
            remedy="choose another repository, or remove that model",
        ) from error


def _declare(port: Any, spec: TensorSpec, joinable: bool) -> None:
    """Describe an input or output; Triton itself adds the images in front where they can join."""
    sizes = spec.shape[1:] if joinable else spec.shape
    port.name, port.data_type = spec.name, _type(spec)
    port.dims.extend([size if isinstance(size, int) else -1 for size in sizes] or [1])
    if not sizes:  # one number, which Triton's requests hold as [1]
        port.reshape.SetInParent()


def _type(spec: TensorSpec) -> int:
    """Return the number of a dtype."""
    kind = spec.dtype.rstrip("0123456789")
    name = f"TYPE_{_TYPES.get(kind, kind.upper())}{spec.dtype[len(kind) :]}"
    number: int = messages()[0].DataType.Value(name)
    return number


def _least_batch(manifest: Manifest) -> int:
    """Return the rows of the smallest call of the loop."""
    branches = 2 if manifest.sampler.cfg_layout.batched else 1
    return manifest.fixed_batch or math.lcm(manifest.batch_multiple, branches)
