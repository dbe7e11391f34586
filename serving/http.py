"""What surrounds every request: an id, the body's size and time, who may ask, a line in the log."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ditfastattn.serving.limits import Limits
from ditfastattn.serving.request import RequestError

log = logging.getLogger("ditfastattn.serving")

Authenticate = Callable[[Mapping[str, str]], Awaitable[bool]]  # the headers of a request

OPEN: Final = frozenset({"/health"})  # what needs no authentication
_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Surround:
    """Read each request's body within its limits, and hand it on with an id."""

    def __init__(self, app: ASGIApp, limits: Limits, authenticate: Authenticate | None) -> None:
        """Take the application, and who may use it: all, where nothing decides."""
        self._app, self._limits, self._authenticate = app, limits, authenticate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        noted: dict[str, Any] = {"id": request_id}
        scope.setdefault("state", {})["noted"] = noted
        began = time.monotonic()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
                noted["status"] = message["status"]
            await send(message)

        try:
            try:
                guarded = scope["path"] not in OPEN
                if guarded and self._authenticate and not await self._authenticate(headers):
                    raise RequestError(401, "not authorized", code="invalid_api_key")
                body = await self._body(headers, receive)
            except RequestError as error:
                answer = JSONResponse(error.body, error.status, {**error.headers, **_CLOSE})
                await answer(scope, receive, sending)
                return
            await self._app(scope, _replay(body, receive), sending)
        finally:
            noted |= {"method": scope["method"], "path": scope["path"][:200]}
            noted["seconds"] = round(time.monotonic() - began, 4)
            log.info("%s", json.dumps({"event": "request", **noted}))

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        most = self._limits.body_bytes
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > most:
            raise _too_large(most)
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RequestError(400, "the body is incomplete", code="incomplete_body")
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise _too_large(most)
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError as error:
            raise RequestError(408, "the body did not arrive in time", code="timeout") from error


_CLOSE: Final = {"Connection": "close"}  # what is left of the body is not read


def _too_large(most: int) -> RequestError:
    return RequestError(413, f"the body is larger than {most} bytes", code="body_too_large")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return what hands out ``body``, then what else is received."""
    left = [body]

    async def replaying() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return replaying
