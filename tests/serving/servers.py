"""A server of a tiny pipeline on a free port, in a thread, and what tests ask of it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image
from torch import Tensor

import ditfastattn
from ditfastattn import Book, Figures, Plan, Target
from ditfastattn.passes.plan.calibration import Measured
from ditfastattn.runtime.pipeline.prompts import Prompt, generate
from ditfastattn.serving.app import create_app
from ditfastattn.serving.http import Authenticate
from ditfastattn.serving.images import ImageServer

IMAGES = "/v1/images/generations"
ASK: dict[str, Any] = {"prompt": "1", "num_inference_steps": 3, "guidance_scale": 2.0, "seed": 3}


def filled_book(folder: Path, plans: Mapping[str, Plan]) -> Book:
    """Return a book with a plan for each tier, the first of which is the default."""
    tiers = {name: Target.min_ssim(0.9 - 0.1 * place) for place, name in enumerate(plans)}
    made = ditfastattn.book(folder, tiers)
    measured = Measured(prompts=4, mean=0.95, worst=0.95)
    for tier, plan in plans.items():
        made.add(plan, tier, Figures(source="validation", metric="ssim", quality=measured))
    return made


@dataclass(frozen=True)
class Answer:
    """What a server has answered."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def error(self) -> Any:
        return self.json["error"]

    @property
    def images(self) -> list[np.ndarray[Any, Any]]:
        return [pixels(each["b64_json"]) for each in self.json["data"]]


def pixels(encoded: str) -> np.ndarray[Any, Any]:
    """Return a PNG's pixels, from 0 to 255."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))), dtype=np.int64)


def rounded(image: Tensor) -> np.ndarray[Any, Any]:
    """Return an image ``[C, H, W]`` as a PNG holds it."""
    found = (image.clamp(0, 1) * 255).round().to(torch.int64).movedim(0, -1).numpy()
    return found[..., 0] if found.shape[-1] == 1 else found


_alone: dict[str, Any] = {}


def alone(pipeline: Any, plan: Plan | None, call: Mapping[str, Any], seed: int) -> Any:
    """Return the pixels of one generation that nothing else runs beside, made once."""
    key = repr((type(pipeline), plan, sorted(call.items()), seed))
    if key not in _alone:
        _alone[key] = _generated(pipeline, plan, call, seed)
    return _alone[key]


def _generated(pipeline: Any, plan: Plan | None, call: Mapping[str, Any], seed: int) -> Any:
    if plan is not None:
        ditfastattn.accelerate(pipeline, plan, lowering="eager")
    (image,) = generate(pipeline, Prompt(call, seed))
    ditfastattn.restore(pipeline)
    return rounded(image)


class Running:
    """A server that runs."""

    server: ImageServer

    def __init__(self, port: int) -> None:
        self.port = port

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """Send one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, {"content-type": "application/json", **named})
            response = connection.getresponse()
            return Answer(
                response.status,
                {key.lower(): value for key, value in response.getheaders()},
                response.read(),
            )
        finally:
            connection.close()

    def ask(self, **changes: Any) -> Answer:
        """Ask for images."""
        return self.request("POST", IMAGES, json.dumps(ASK | changes).encode())

    def connect(self, body: bytes, length: int | None = None) -> socket.socket:
        """Return a connection that has sent a request whose body is ``length`` bytes long."""
        found = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        length = len(body) if length is None else length
        head = f"POST {IMAGES} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        found.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + body)
        return found

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        lines = self.request("GET", "/metrics").content.decode().splitlines()
        values = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return sum(float(v) for key, v in values if key.partition("{")[0] == f"ditfastattn_{name}")

    def wait_for(self, name: str, value: float) -> None:
        """Wait until a metric has a value."""
        end = time.monotonic() + 30
        while self.metric(name) != value:
            assert time.monotonic() < end, (name, self.metric(name))
            time.sleep(0.02)


@contextmanager
def running(server: ImageServer, authenticate: Authenticate | None = None) -> Generator[Running]:
    """Run ``server`` under uvicorn; it drains as the block ends."""
    with running_app(create_app(server, authenticate)) as found:
        found.server = server
        yield found


@contextmanager
def running_app(app: FastAPI) -> Generator[Running]:
    """Run ``app`` in the same way."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    host = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=host.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not host.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Running(listening.getsockname()[1])
    finally:
        host.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
