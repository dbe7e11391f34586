"""Serve a book from two Ray nodes on this machine, and kill one of them under load.

    pip install 'ditfastattn[serve-ray]'
    python -m ditfastattn.tools.benchmark_ray --out benchmarks/serving

Each node has a raylet, a proxy and a replica of its own. Every image is compared with the same seed
made alone in this process.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.tools.benchmarking.served_images import Answers, Body, ask_all, make_twins
from ditfastattn.tools.benchmarking.subject import open_subject
from ditfastattn.tools.embedded import ModelName
from ditfastattn.tools.measure import write_record
from ditfastattn.tools.terminal import open_console

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
_LIMIT = 600.0  # seconds that one round of requests may take


@app.command()
def nodes(
    out: Annotated[Path, typer.Option(help="Folder for the JSON.")] = Path("benchmarks/serving"),
    requests: Annotated[int, typer.Option(min=8, help="Requests of each round.")] = 40,
    concurrency: Annotated[int, typer.Option(min=2, help="Requests at a time.")] = 8,
    after: Annotated[float, typer.Option(help="Seconds of load before the node is killed.")] = 3.0,
) -> None:
    """Ask for images before, while and after one of two nodes is killed.

    Exit with 1 if an image differs, if more requests are lost than were under way as the node was
    killed, or if one is lost before or after.
    """
    with (
        open_subject(ModelName.DIGITS, None, "", Lowering.EAGER) as subject,
        _two_nodes() as (cluster, second),
    ):
        bodies = subject.bodies(requests)
        twins = make_twins(subject.twins, bodies)
        options = ("--replicas", "2", "--max-replicas", "2", "--no-warm-up")
        with subject.served(*options, on="ray", environment={"RAY_ADDRESS": cluster.address}) as at:
            _wait_for_replicas()

            def asked(these: Sequence[Body]) -> Answers:
                answers = Answers()
                ask_all(at.url, these, concurrency, twins, time.monotonic() + _LIMIT, answers)
                return answers

            before = asked(bodies)
            killing = threading.Timer(after, cluster.remove_node, (second, False))
            killing.start()
            during = asked(bodies)
            killing.join()
            later = asked(bodies[: requests // 2])
    rounds = {"before": before, "during": during, "after": later}
    summaries = {name: answers.summary() for name, answers in rounds.items()}
    write_record(
        out / "nodes.json",
        subject.arguments(requests=requests, concurrency=concurrency, killed_after=after),
        **summaries,
    )
    console = open_console()
    for name, found in summaries.items():
        right, lost = found["images"] - found["images_that_differ"], len(found["failed"])
        console.print(f"{name}: {right} of {found['images']} images right, {lost} requests lost")
    if _wrong(before, during, later, concurrency):
        raise typer.Exit(1)


def _wrong(before: Answers, during: Answers, after: Answers, concurrency: int) -> bool:
    """Return whether an image differs, or a request is lost that was not on the killed node."""
    differ = any(level for each in (before, during, after) for level in each.levels)
    lost = [len(each.failed) for each in (before, during, after)]
    return differ or lost[0] > 0 or lost[1] > concurrency or lost[2] > 0


@contextmanager
def _two_nodes() -> Generator[tuple[Any, Any]]:
    """Start a cluster of two nodes of a core each; yield it and the second node."""
    try:
        ray, utilities = (importlib.import_module(name) for name in ("ray", "ray.cluster_utils"))
    except ImportError as error:
        raise ConfigError(
            "Ray is not installed", got=error, remedy="pip install 'ditfastattn[serve-ray]'"
        ) from error
    node = {"num_cpus": 1, "include_dashboard": False}
    cluster = utilities.Cluster(initialize_head=True, connect=True, head_node_args=node)
    try:
        yield cluster, cluster.add_node(num_cpus=1)
    finally:
        ray.shutdown()
        cluster.shutdown()


def _wait_for_replicas() -> None:
    """Wait until each node's core has its replica."""
    ray, end = importlib.import_module("ray"), time.monotonic() + _LIMIT
    while ray.available_resources().get("CPU", 0.0) > 0.0:
        if time.monotonic() > end:
            raise RuntimeError("the second replica has not started")
        time.sleep(0.2)


if __name__ == "__main__":
    app()
