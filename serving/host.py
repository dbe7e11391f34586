"""Host the application: under uvicorn in this process, or under Ray Serve on a cluster."""

from __future__ import annotations

import hmac
import importlib
import importlib.util
import logging
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.strict_json import read_text
from ditfastattn.serving.http import Authenticate
from ditfastattn.serving.limits import Limits

log = logging.getLogger(__name__)

_NAME: Final = "ditfastattn"  # of the application on Ray Serve


@dataclass(frozen=True)
class Replicas:
    """How many replicas Ray Serve runs: as many as are needed between ``least`` and ``most``."""

    least: int = 1
    most: int = 1
    gpus: float = 0.0  # of each


def run_uvicorn(app: FastAPI, host: str, port: int, limits: Limits) -> None:
    """Serve ``app`` until SIGTERM or SIGINT; what was accepted is finished first."""
    import uvicorn

    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=limits.connections,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=int(limits.seconds) + 5,
    )
    uvicorn.Server(config).run()


def has_ray() -> bool:
    """Return whether Ray is installed."""
    return importlib.util.find_spec("ray") is not None


def run_ray(
    build: Callable[[], FastAPI], host: str, port: int, limits: Limits, replicas: Replicas
) -> None:
    """Serve on the Ray cluster that ``RAY_ADDRESS`` names, or on one that is started here.

    At SIGTERM or SIGINT the application is taken from the cluster; what was accepted is finished.
    """
    application, serve = ray_application(build, limits, replicas), _ray_serve()
    serve.start(http_options={"host": host, "port": port})
    ended = threading.Event()
    serve.run(application, name=_NAME, route_prefix="/")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
    serve.delete(_NAME)  # once its replicas have drained


def ray_application(build: Callable[[], FastAPI], limits: Limits, replicas: Replicas) -> Any:
    """Return the application for Ray Serve.

    Each replica calls ``build``, which must be picklable, and has up to ``limits.turns`` batches
    under way.
    """
    serve = _ray_serve()

    def application() -> FastAPI:  # Ray takes functions alone as what builds an application
        return build()

    made = serve.deployment(
        name="images",
        max_ongoing_requests=limits.connections,
        graceful_shutdown_timeout_s=limits.seconds,
        ray_actor_options={"num_gpus": replicas.gpus},
        autoscaling_config={
            "min_replicas": replicas.least,
            "max_replicas": replicas.most,
            "target_ongoing_requests": limits.batch * (limits.turns + 1),
        },
    )(serve.ingress(application)(_Replica))
    return made.bind()


class _Replica:
    """What Ray Serve deploys; all is in the application."""


def _ray_serve() -> Any:
    try:
        return importlib.import_module("ray.serve")
    except ImportError as error:
        raise ConfigError(
            "Ray Serve is not installed",
            where="--on ray",
            got=error,
            remedy="pip install 'ditfastattn[serve-ray]', or serve with --on uvicorn",
        ) from error


def require_keys(keys: Sequence[str]) -> Authenticate:
    """Return what admits requests whose bearer token is one of ``keys``."""
    known = [key.encode() for key in keys]

    async def authenticate(headers: Mapping[str, str]) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        token = given.strip().encode("utf-8", "surrogateescape")
        # All are compared, so that the time taken tells nothing.
        found = [hmac.compare_digest(token, key) for key in known]
        return scheme.lower() == "bearer" and any(found)

    return authenticate


def read_keys(path: Path) -> list[str]:
    """Return the keys in ``path``, one a line.

    Raises:
        ConfigError: there is none.
    """
    keys = [line.strip() for line in read_text(path, "the API keys").splitlines() if line.strip()]
    if not keys:
        raise ConfigError("the file holds no key", where=str(path), expected="one per line")
    return keys


def log_as_json() -> None:
    """Write the log to standard error, a JSON object or a plain message per line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name, level in (("ditfastattn", logging.WARNING), ("ditfastattn.serving", logging.INFO)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.propagate = False
        logger.handlers = [handler]
    logging.getLogger("uvicorn").addHandler(handler)
