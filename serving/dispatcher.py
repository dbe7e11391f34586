"""The bounded queue of a server: which images wait, and which are generated together.

Up to ``Limits.turns`` batches are under way, each in a thread of its own. The queue lives in the
event loop, so nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from ditfastattn.serving.job import Job, Made, StoppedError
from ditfastattn.serving.limits import Limits
from ditfastattn.serving.request import RequestError

log = logging.getLogger(__name__)

Generate = Callable[[Sequence[Job]], list[Made]]
Check = Callable[[Sequence[Job], Sequence[Made]], None]


class Dispatcher:
    """Let jobs wait, and hand them in batches of one kind to the threads that generate."""

    def __init__(self, generate: Generate, limits: Limits, check: Check) -> None:
        """Take what generates the images of some jobs; ``run`` it in the event loop.

        ``check`` is called in such a thread with images that have been handed over.
        """
        self._generate, self._limits, self._check = generate, limits, check
        self._waiting: deque[tuple[Job, asyncio.Future[Made]]] = deque()
        self._wake = asyncio.Event()
        self._threads = ThreadPoolExecutor(limits.turns, "ditfastattn-generate")
        self._seconds = 1.0  # from one image to the next, on average
        self._ended = -math.inf  # when images were made last
        self.generating = 0
        self.draining = False

    @property
    def waiting(self) -> int:
        """Return how many images wait."""
        return len(self._waiting)

    def submit(self, jobs: Sequence[Job]) -> list[asyncio.Future[Made]]:
        """Queue all of ``jobs``, or none.

        Raises:
            RequestError: the queue is full, or the server ends.
        """
        if self.draining:
            raise RequestError(503, "the server ends", code="draining", retry_after=10)
        self._drop_given_up()
        if len(self._waiting) + len(jobs) > self._limits.queue:
            later = max(1, math.ceil(self._seconds * len(self._waiting)))
            raise RequestError(
                503, "too many images wait already", code="queue_full", retry_after=later
            )
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in jobs]
        self._waiting.extend(zip(jobs, futures, strict=True))
        self._wake.set()
        return futures

    async def run(self) -> None:
        """Generate what waits, until cancelled."""
        free = asyncio.Semaphore(self._limits.turns)
        async with asyncio.TaskGroup() as under_way:
            while True:
                await free.acquire()
                batch = await self._next_batch()
                self.generating += len(batch)
                task = under_way.create_task(self._made(batch))
                task.add_done_callback(lambda _: free.release())

    async def _made(self, batch: Sequence[tuple[Job, asyncio.Future[Made]]]) -> None:
        """Generate ``batch`` and hand its images over; check them then."""
        jobs, began = [job for job, _ in batch], time.monotonic()
        try:
            loop = asyncio.get_running_loop()
            made = await loop.run_in_executor(self._threads, self._generate, jobs)
        except Exception as error:
            if not isinstance(error, StoppedError):
                log.warning("ditfastattn: a generation failed: %s", error)
            for _, future in batch:
                _fail(future, error)
            return
        finally:
            self.generating -= len(batch)
        self._count(began, len(batch))
        for (_, future), image in zip(batch, made, strict=True):
            if not future.done():
                future.set_result(image)
        await self._checked(jobs, made)

    def _count(self, began: float, images: int) -> None:
        """Learn how long images take: since others were made, or since these began."""
        now = time.monotonic()
        self._seconds += 0.2 * ((now - max(began, self._ended)) / images - self._seconds)
        self._ended = now

    async def _checked(self, jobs: Sequence[Job], made: Sequence[Made]) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._check, jobs, made)
        except Exception as error:
            log.warning("ditfastattn: an image was not checked: %s", error)

    async def drain(self, seconds: float) -> None:
        """Accept nothing more, and wait at most ``seconds`` for what was accepted."""
        self.draining = True
        end = time.monotonic() + seconds
        while (self._waiting or self.generating) and time.monotonic() < end:
            await asyncio.sleep(0.02)
        while self._waiting:
            _fail(self._waiting.popleft()[1], StoppedError())

    def close(self) -> None:
        """Let the threads end once they have nothing to do."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _next_batch(self) -> list[tuple[Job, asyncio.Future[Made]]]:
        """Return what has waited longest, and others of its kind, as many as fit one batch."""
        while True:
            self._drop_given_up()
            if self._waiting:
                break
            self._wake.clear()
            await self._wake.wait()
        kind = self._waiting[0][0].wanted.kind
        end = time.monotonic() + self._limits.window
        while self._of(kind) < self._limits.batch and (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.002))
        self._drop_given_up()
        batch = [entry for entry in self._waiting if entry[0].wanted.kind == kind]
        batch = batch[: self._limits.batch]
        if not batch:
            return await self._next_batch()
        for entry in batch:
            self._waiting.remove(entry)
        return batch

    def _of(self, kind: object) -> int:
        return sum(job.wanted.kind == kind for job, _ in self._waiting)

    def _drop_given_up(self) -> None:
        for job, future in [entry for entry in self._waiting if entry[0].given_up()]:
            self._waiting.remove((job, future))
            _fail(future, StoppedError())


def _fail(future: asyncio.Future[Made], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # whoever waits raises it; where nobody does, that is no fault
