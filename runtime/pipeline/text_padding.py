"""Pad the text of a transformer's calls to one length, with a mask, so that one graph serves all.

Some pipelines (Qwen-Image) call their transformer with as many text tokens as a prompt has. A plan
is for one length, and guidance in two calls would take two. Padding that a mask hides leaves the
output as it is; a calibration measures that.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Generator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.analysis.fingerprint import is_offloaded
from ditfastattn.passes.plan.text import PaddedText
from ditfastattn.runtime.pipeline.denoiser import transformer_of
from ditfastattn.runtime.pipeline.forwards import own_forward
from ditfastattn.runtime.pipeline.hooks import ACCELERATE
from ditfastattn.runtime.pipeline.model_call import by_name, output_of
from ditfastattn.runtime.writes import NOT_COUNTED, counted_writes

log = logging.getLogger(__name__)

_TEXT = "encoder_hidden_states"
_MASKS = (f"{_TEXT}_mask", "encoder_attention_mask")  # as diffusers names them
_MOST_CHANGE = {torch.float32: 1e-4}  # of the largest output
_MOST_CHANGE_HALF = 1e-2
_HOOK = "_ditfastattn_text_padding"  # in a module's dict, while its text is padded


def text_of(module: nn.Module, length: int) -> PaddedText:
    """Return how the text of ``module`` can be padded to ``length`` tokens.

    Raises:
        ConfigError: its forward does not take a text, and a mask that hides tokens of it.
    """
    known = inspect.signature(type(module).forward).parameters
    mask = next((name for name in _MASKS if name in known), "")
    if length < 1 or _TEXT not in known or not mask:
        raise ConfigError(
            "the text cannot be padded",
            where="calibrate(text_length)",
            got=f"{length}, for {type(module).__name__}.forward({', '.join([*known][1:])})",
            expected=f"a number of tokens, for a model with {_TEXT}, and {' or '.join(_MASKS)}",
            remedy="leave text_length out, and give prompts of equal length",
        )
    return PaddedText(argument=_TEXT, mask=mask, length=length)


def pad_text(module: nn.Module, texts: Sequence[PaddedText], check: bool = False) -> None:
    """Pad the text of each call of ``module`` to the shortest of ``texts`` that holds it.

    A longer one is left as it is, and so are all where there are no ``texts``. What padded them
    before is undone.

    Args:
        module: the transformer.
        texts: of one argument and one mask.
        check: at the first call, refuse a model whose output depends on the padding.
    """
    before: _Padding | None = vars(module).pop(_HOOK, None)
    if before is not None and before.handle is not None:
        before.handle.remove()
    if texts:
        padding = _Padding(tuple(sorted(texts, key=lambda text: text.length)), check)
        hook: Any = padding
        padding.handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        vars(module)[_HOOK] = padding


def padded_text(module: nn.Module) -> PaddedText | None:
    """Return how the text of ``module`` is padded: to one length, or not at all."""
    padding: _Padding | None = vars(module).get(_HOOK)
    return padding.texts[0] if padding is not None and len(padding.texts) == 1 else None


@contextmanager
def text_padded(
    pipeline: Any, text: PaddedText | int | None, check: bool = False
) -> Generator[None]:
    """Pad the text of the transformer of ``pipeline`` within, as ``text`` says, or to a length.

    Without one, or where it is padded so already, nothing changes.
    """
    if not text:
        yield
        return
    module = transformer_of(pipeline, "a pipeline whose text is padded")
    wanted = text_of(module, text) if isinstance(text, int) else text
    before: _Padding | None = vars(module).get(_HOOK)
    pad_text(module, [wanted], check)
    try:
        yield
    finally:
        pad_text(module, before.texts if before is not None else ())


@dataclass(frozen=True)
class _Padded:
    """A text and its mask, padded, and what they were made of."""

    text: Tensor
    mask: Tensor
    source: ref[Tensor] | None  # the mask, None where there was none
    versions: tuple[int, ...]

    @classmethod
    def of(cls, text: Tensor, mask: Tensor | None, length: int) -> _Padded:
        """Pad ``text`` and ``mask`` to ``length``."""
        absent = length - text.shape[1]
        shown = mask
        if shown is None:
            shown = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        return cls(
            pad(text, (0, 0, 0, absent)),
            pad(shown, (0, absent)),
            None if mask is None else ref(mask),
            _versions(text, mask),
        )

    def holds(self, text: Tensor, mask: Tensor | None) -> bool:
        """Return whether this is of the same mask, and no counted write has changed either."""
        source = None if self.source is None else self.source()
        counted = NOT_COUNTED not in self.versions
        return counted and source is mask and self.versions == _versions(text, mask)


def _versions(*tensors: Tensor | None) -> tuple[int, ...]:
    """Return the counts of writes to those that there are."""
    return tuple(counted_writes(tensor) for tensor in tensors if tensor is not None)


class TextPadder:
    """Pad the arguments of calls to the shortest of some lengths that holds their text."""

    def __init__(self, texts: Sequence[PaddedText]) -> None:
        """Take the lengths, the shortest first, of one argument and one mask."""
        self._texts = tuple(texts)
        # The same arguments stay the same tensors: by them a generation's calls are recognized.
        self._padded: MutableMapping[Tensor, _Padded] = WeakTensorKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the lengths alone."""
        return TextPadder, (self._texts,)

    def __call__(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``arguments``, by name, with text and mask padded; as they are if too long."""
        text = arguments.get(self._texts[0].argument)
        if not isinstance(text, Tensor) or text.dim() != 3:
            return dict(arguments)
        fits = (one for one in self._texts if one.length >= text.shape[1])
        wanted = next(fits, None)
        if wanted is None:
            return dict(arguments)
        mask = arguments.get(wanted.mask)
        known = self._padded.get(text)
        if known is None or not known.holds(text, mask):
            known = self._padded[text] = _Padded.of(text, mask, wanted.length)
        return {**arguments, wanted.argument: known.text, wanted.mask: known.mask}


class _Padding:
    """Pad the text of one module's calls, as a hook before its forward."""

    def __init__(self, texts: tuple[PaddedText, ...], check: bool) -> None:
        self.texts = texts
        self._check, self._pad = check, TextPadder(texts)
        self.handle: RemovableHandle | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a call of ``module``, padded."""
        args, given = by_name(type(module), args, kwargs)
        padded = self._pad(given)
        name = self.texts[0].argument
        if self._check and name in given and padded[name].shape != given[name].shape:
            self._check = False
            _check_ignored(module, args, given, padded)
        return args, padded


def _check_ignored(
    module: nn.Module, args: Sequence[Any], given: Mapping[str, Any], padded: Mapping[str, Any]
) -> None:
    """Raise ``ConfigError`` unless ``module`` computes the same with padding as without."""
    kind = type(module).__name__
    if is_offloaded(module) or ACCELERATE in vars(module):
        log.warning(
            "ditfastattn: the weights of %s are moved in as it runs: whether it ignores the "
            "padding of its text is not checked",
            kind,
        )
        return
    forward = own_forward(module)
    with torch.no_grad():
        plain, other = (output_of(forward(*args, **each)) for each in (given, padded))
    change = float((other - plain).abs().max() / plain.abs().max().clamp(min=1e-12))
    most = _MOST_CHANGE.get(plain.dtype, _MOST_CHANGE_HALF)
    if not change <= most:
        raise ConfigError(
            "the model's output depends on the padding of its text",
            where=f"calibrate(text_length): {kind}",
            got=f"a change of {change:.1e}, relative to the largest output",
            expected=f"at most {most:g}",
            remedy="leave text_length out, and give prompts of equal length",
        )
    log.info("padding the text of %s changes its output by %.1e", kind, change)
