"""Follow a trace through the modules of a model: which one each node came from.

Modules that stay whole are one call each.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ditfastattn.passes.capture.opaque_blocks import OpaqueBlock


@contextmanager
def following(module: nn.Module, opaque: Mapping[str, str]) -> Generator[None]:
    """Note on each node the module that runs; let those that are ``opaque`` be one call each."""
    thread = threading.get_ident()
    blocks = {path: OpaqueBlock(module.get_submodule(path), path) for path in opaque}

    def enter(path: str) -> Callable[..., None]:
        def run(part: nn.Module, *_: Any) -> None:
            mode = get_proxy_mode() if threading.get_ident() == thread else None
            if mode is not None:
                stack: OrderedDict[str, Any] = mode.tracer.module_stack
                entered.append(path)
                stack[path] = (path, type(part))

        return run

    def leave(path: str) -> Callable[..., None]:
        def run(*_: Any) -> None:
            mode = get_proxy_mode() if threading.get_ident() == thread else None
            if mode is not None and entered and entered[-1] == path:
                entered.pop()
                if path not in entered:
                    mode.tracer.module_stack.pop(path, None)

        return run

    entered: list[str] = []
    with ExitStack() as undo:
        for path, part in module.named_modules():
            if path in blocks:
                undo.enter_context(_called_whole(part, blocks[path], thread))
            if path:
                undo.callback(part.register_forward_pre_hook(enter(path)).remove)
                undo.callback(part.register_forward_hook(leave(path), always_call=True).remove)
        yield


@contextmanager
def _called_whole(part: nn.Module, block: OpaqueBlock, thread: int) -> Generator[None]:
    own, before = part.forward, vars(part).get("forward")

    def run(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread or get_proxy_mode() is None:
            return own(*args, **kwargs)
        return block.call(part, args, kwargs)

    vars(part)["forward"] = run
    try:
        yield
    finally:
        if before is None:
            del vars(part)["forward"]
        else:
            vars(part)["forward"] = before
