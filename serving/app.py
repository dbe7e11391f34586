"""The HTTP application: OpenAI's images, the models, health and metrics.

It knows nothing of what hosts it: uvicorn, Ray Serve, or a test.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from asyncio import Future
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.version import __version__
from ditfastattn.serving.dispatcher import Dispatcher
from ditfastattn.serving.http import Authenticate, Surround
from ditfastattn.serving.images import ImageServer
from ditfastattn.serving.job import Job, Made, StoppedError
from ditfastattn.serving.metrics import Metrics
from ditfastattn.serving.pipeline import NotFiniteError
from ditfastattn.serving.request import ImageRequest, RequestError

_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    400: {"description": "The request cannot be served."},
    401: {"description": "Not authorized."},
    408: {"description": "The body did not arrive in time."},
    413: {"description": "The body is too large."},
    500: {"description": "The generation failed."},
    503: {"description": "The queue is full (try again after Retry-After seconds), or memory is."},
    504: {"description": "The images were not made in time."},
}


def create_app(server: ImageServer, authenticate: Authenticate | None = None) -> FastAPI:
    """Return the application that serves ``server``.

    Args:
        server: what makes the images.
        authenticate: takes a request's headers, and decides whether it may be served. Without it
            all may. ``/health`` is open always.
    """

    def check(jobs: Sequence[Job], made: Sequence[Made]) -> None:
        found = server.check(jobs, made)
        if found is not None:
            metrics.checked(found)

    dispatcher = Dispatcher(server.generate, server.limits, check)
    metrics = Metrics(
        lambda: dispatcher.waiting, lambda: dispatcher.generating, server.limits.turns
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        running = asyncio.create_task(dispatcher.run())
        yield
        await dispatcher.drain(server.limits.seconds)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        server.close()
        dispatcher.close()

    app = FastAPI(title="ditfastattn", version=__version__, lifespan=lifespan)
    app.add_middleware(Surround, limits=server.limits, authenticate=authenticate)
    images = _Images(server, dispatcher, metrics)

    @app.post("/v1/images/generations", responses=_ERRORS, summary="Generate images")
    async def generations(body: ImageRequest, request: Request) -> Response:
        return await images.answer(body, request)

    @app.get("/v1/models", summary="The model, with the tiers of quality and what they promise")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [server.described()]}

    @app.get("/v1/models/{model}", responses={404: {"description": "No such model."}})
    async def model(model: str) -> dict[str, Any]:
        if model != server.name:
            raise RequestError(404, f"no such model: {model[:200]}", code="model_not_found")
        return server.described()

    @app.get("/health", responses={503: {"description": "The server ends."}})
    async def health() -> JSONResponse:
        state = "draining" if dispatcher.draining else "ready"
        return JSONResponse({"status": state}, 503 if dispatcher.draining else 200)

    @app.get("/metrics", summary="Counters for Prometheus")
    async def counters() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(RequestError)
    async def refused(_request: Request, error: RequestError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = ".".join(str(part)[:64] for part in first["loc"] if part != "body")
        return JSONResponse(RequestError(400, first["msg"], param=param).body, 400)

    @app.exception_handler(HTTPException)
    async def failed(_request: Request, error: HTTPException) -> JSONResponse:
        answer = RequestError(error.status_code, str(error.detail)).body
        return JSONResponse(answer, error.status_code, error.headers)

    return app


class _Images:
    """Answer requests for images."""

    def __init__(self, server: ImageServer, dispatcher: Dispatcher, metrics: Metrics) -> None:
        self._server, self._dispatcher, self._metrics = server, dispatcher, metrics

    async def answer(self, body: ImageRequest, request: Request) -> Response:
        """Wait for the images of ``body``, or stream how they come along.

        Raises:
            RequestError: they cannot be made.
        """
        began = time.monotonic()
        tier = ""
        try:
            wanted = self._server.wanted(body)
            tier = wanted[0].kind.tier
            deadline = began + self._server.limits.seconds
            jobs = [Job(each, deadline) for each in wanted]
            futures = self._dispatcher.submit(jobs)
            if body.stream:
                return self._streaming(jobs, futures, request, began)
            made = await self._made(jobs, futures, request)
        except RequestError as error:
            self._metrics.answered(tier, error.status, 0.0)
            raise
        self._note(made, tier, jobs, request)
        self._metrics.answered(tier, 200, time.monotonic() - began)
        return JSONResponse(_response(made), headers=_headers(made))

    async def _made(
        self, jobs: Sequence[Job], futures: Sequence[Future[Made]], request: Request
    ) -> list[Made]:
        """Return the images; give them up when the client goes or the time is over."""
        gone = asyncio.create_task(_disconnected(request))
        try:
            for future in futures:
                left = max(0.0, jobs[0].deadline - time.monotonic())
                either: set[Future[Any]] = {future, gone}
                await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if not future.done():
                    raise StoppedError
            return [future.result() for future in futures]
        except asyncio.CancelledError:  # as Ray Serve says that the client has gone
            self._metrics.stopped()
            raise
        except StoppedError as error:
            self._metrics.stopped()
            if gone.done():
                raise RequestError(499, "the client has gone", code="client_closed") from error
            raise RequestError(504, "not made in time", code="timeout") from error
        except ConfigError as error:
            raise RequestError(400, str(error), code="no_plan") from error
        except NotFiniteError as error:
            self._metrics.not_finite()
            raise RequestError(500, str(error), code="not_finite") from error
        except torch.OutOfMemoryError as error:
            what = "out of memory; ask for a smaller size, or fewer images"
            raise RequestError(503, what, code="out_of_memory") from error
        except Exception as error:
            raise RequestError(
                500, f"the generation failed: {type(error).__name__}", code="failed"
            ) from error
        finally:
            gone.cancel()
            for job in jobs:
                job.cancelled = True

    def _streaming(
        self, jobs: Sequence[Job], futures: Sequence[Future[Made]], request: Request, began: float
    ) -> Response:
        """Return server-sent events: each step, then the images."""
        tier = jobs[0].wanted.kind.tier
        loop, steps = asyncio.get_running_loop(), asyncio.Queue[tuple[int, int, int]]()

        def progress(index: int, done: int, of: int) -> None:
            loop.call_soon_threadsafe(steps.put_nowait, (index, done, of))

        for index, job in enumerate(jobs):
            job.on_step = partial(progress, index)
        # It begins now, so that it ends too where the client has gone before the first event.
        waiting = asyncio.create_task(self._made(jobs, futures, request))
        waiting.add_done_callback(lambda task: task.cancelled() or task.exception())

        async def events() -> AsyncGenerator[str]:
            try:
                while not waiting.done() or not steps.empty():
                    step = asyncio.create_task(steps.get())
                    await asyncio.wait({waiting, step}, return_when=asyncio.FIRST_COMPLETED)
                    if not step.done():
                        step.cancel()
                        continue
                    index, done, of = step.result()
                    yield _event("progress", {"image_index": index, "step": done, "steps": of})
                made = await waiting
            except RequestError as error:
                self._metrics.answered(tier, error.status, 0.0)
                yield _event("error", error.body, "error")
                return
            finally:
                waiting.cancel()
            self._note(made, tier, jobs, request)
            self._metrics.answered(tier, 200, time.monotonic() - began)
            for index, each in enumerate(_response(made)["data"]):
                yield _event("completed", {"image_index": index, **each})

        return StreamingResponse(events(), media_type="text/event-stream")

    def _note(self, made: Sequence[Made], tier: str, jobs: Sequence[Job], request: Request) -> None:
        kind = jobs[0].wanted.kind
        for image in made:
            self._metrics.made(image, tier, kind.steps)
        request.state.noted.update(
            tier=tier,
            plan=made[0].choice.name or "dense",
            reason=made[0].choice.reason,
            steps=kind.steps,
            images=len(made),
            waited=round(max(job.began - job.arrived for job in jobs), 4),
            batch=made[0].batch,
        )


async def _disconnected(request: Request) -> None:
    """Return when the client has gone: after its body nothing else comes."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _response(made: Sequence[Made]) -> dict[str, Any]:
    data = [
        {"b64_json": base64.b64encode(image.png).decode(), "seed": image.seed} for image in made
    ]
    return {"created": int(time.time()), "data": data, "output_format": "png"}


def _headers(made: Sequence[Made]) -> dict[str, str]:
    return {"x-ditfastattn-plan": made[0].choice.name or "dense"}


def _event(name: str, data: dict[str, Any], kind: str = "") -> str:
    named = kind or f"image_generation.{name}"
    return f"event: {named}\ndata: {json.dumps({'type': named, **data})}\n\n"
