"""Requests to a server, the images of each made alone, and what a client sees of both."""

from __future__ import annotations

import base64
import io
import math
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openai
from numpy.typing import NDArray
from PIL import Image

from ditfastattn.serving.images import ImageServer
from ditfastattn.serving.job import Job
from ditfastattn.serving.request import ImageRequest

SIZES = (1, 1, 2)  # how many images requests ask for, in turn
PERCENTILES = (50, 95, 99)

Body = Mapping[str, Any]  # of a request
Pixels = NDArray[np.int64]  # [H, W, C], from 0 to 255
Twins = Mapping[tuple[str, str, int], Pixels]  # by tier, prompt and seed


@dataclass
class Answers:
    """What the answers to some requests were.

    Attributes:
        seconds: of each request by tier, waiting and trying again included.
        levels: per image, how far it is from the image made alone, in levels of 255.
        refused: how often the server was full.
        failed: other errors.
        elapsed: the seconds of all requests together.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    levels: list[int] = field(default_factory=list)
    refused: int = 0
    failed: list[str] = field(default_factory=list)
    elapsed: float = 0.0

    def summary(self) -> dict[str, Any]:
        """Return what is recorded."""
        return {
            "requests": sum(map(len, self.seconds.values())),
            "images": len(self.levels),
            "seconds": self.elapsed,
            "images_per_second": len(self.levels) / self.elapsed if self.elapsed else 0.0,
            "latency_seconds": {tier: _latency(each) for tier, each in self.seconds.items()},
            "refused": self.refused,
            "failed": self.failed,
            "images_that_differ": sum(level > 0 for level in self.levels),
            "most_levels_apart": max(self.levels, default=0),
        }


def make_bodies(
    count: int, tiers: Sequence[str], prompts: Sequence[str], call: Mapping[str, Any]
) -> list[Body]:
    """Return ``count`` requests of all tiers, prompts and ``SIZES``, in a shuffled order.

    A prompt has a seed of its own; ``call`` holds the fields that all have in common.
    """
    made: list[Body] = []
    for number in range(count):
        place = number // len(tiers) % len(prompts)
        asked = {"quality": tiers[number % len(tiers)], "prompt": prompts[place]}
        made.append({**call, **asked, "n": SIZES[number % len(SIZES)], "seed": 10 * place})
    random.Random(0).shuffle(made)
    return made


def make_twins(server: ImageServer, bodies: Sequence[Body]) -> Twins:
    """Return each image that ``bodies`` ask for, made alone in this process."""
    made: dict[tuple[str, str, int], Pixels] = {}
    for body in bodies:
        for wanted in server.wanted(ImageRequest.model_validate(body)):
            key = body["quality"], body["prompt"], wanted.seed
            if key not in made:
                (image,) = server.generate([Job(wanted, math.inf)])
                made[key] = _pixels(image.png)
    return made


def ask_all(
    url: str,
    bodies: Sequence[Body],
    concurrency: int,
    twins: Twins,
    until: float,
    answers: Answers,
) -> None:
    """Send ``bodies`` by OpenAI's client, ``concurrency`` at a time, and compare their images.

    A request that is refused is sent again when the server says. What has not been sent at
    ``until``, by ``time.monotonic``, stays unsent. ``answers`` grows meanwhile.
    """
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600.0)
    lock = threading.Lock()

    def ask(body: Body) -> None:
        began = time.monotonic()
        while time.monotonic() < until:
            try:
                images = _generated(client, body)
            except openai.APIStatusError as error:
                again = error.response.headers.get("retry-after")
                if error.status_code == 503 and again is not None:
                    with lock:
                        answers.refused += 1
                    time.sleep(float(again))
                    continue
                with lock:
                    answers.failed.append(str(error)[:200])
            except openai.APIError as error:
                with lock:
                    answers.failed.append(f"{type(error).__name__}: {error}"[:200])
            else:
                seconds, tier = time.monotonic() - began, body["quality"]
                levels = [_apart(image, body, k, twins) for k, image in enumerate(images)]
                with lock:
                    answers.seconds.setdefault(tier, []).append(seconds)
                    answers.levels += levels
            return

    began = time.monotonic()
    with client, ThreadPoolExecutor(concurrency) as pool:
        list(pool.map(ask, bodies))
    answers.elapsed = time.monotonic() - began


def _generated(client: openai.OpenAI, body: Body) -> list[Pixels]:
    known = {name: body[name] for name in ("prompt", "n", "quality")}
    extra = {name: value for name, value in body.items() if name not in known}
    generate: Any = client.images.generate  # OpenAI's own tiers have other names
    data = generate(**known, extra_body=extra).data
    return [_pixels(base64.b64decode(each.b64_json)) for each in data]


def _pixels(png: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(png)), dtype=np.int64)


def _apart(image: Pixels, body: Body, place: int, twins: Twins) -> int:
    twin = twins[body["quality"], body["prompt"], body["seed"] + place]
    return int(np.abs(image - twin).max()) if image.shape == twin.shape else 255


def _latency(seconds: Sequence[float]) -> dict[str, float]:
    values = np.percentile(seconds, PERCENTILES)
    named = {f"p{rank}": float(value) for rank, value in zip(PERCENTILES, values, strict=True)}
    return {"requests": len(seconds), **named}
