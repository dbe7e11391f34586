"""``ditfastattn serve``: a book or a bundle, opened and served as the command line says."""

from __future__ import annotations

import contextlib
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ditfastattn
from ditfastattn import ConfigError, Plan
from ditfastattn.serving import host
from ditfastattn.serving.images import ImageServer
from ditfastattn.serving.limits import Limits
from ditfastattn.tools.benchmarking.server_process import server_process
from ditfastattn.tools.commands import app as cli
from ditfastattn.tools.commands.serve import Served, build_app
from tests.helpers import attentive_pipeline
from tests.serving.servers import ASK, IMAGES, Running, alone, running, running_app
from tests.three_steps import CALL
from tests.works_with import works_with


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline: Any = attentive_pipeline()
    pipeline.save_pretrained(folder)
    return folder


def test_a_book_is_opened_as_the_command_line_says(
    book_folder: Path,
    pipeline_folder: Path,
    plans: dict[str, Plan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(host, "log_as_json", lambda: None)
    (tmp_path / "keys").write_text("one\n\ntwo\n")
    served = Served.from_json(
        {
            "source": str(book_folder),
            "pipeline": str(pipeline_folder),
            "name": "mine",
            "keys": str(tmp_path / "keys"),
            "lowering": "eager",
        },
        "args",
        "",
    )
    with running_app(build_app(served, Limits(images=2))) as found:
        assert found.ask().status == 401
        body = json.dumps(ASK | {"n": 2}).encode()
        answer = found.request("POST", IMAGES, body, authorization="Bearer two")
        assert np.array_equal(answer.images[0], alone(attentive_pipeline(), plans["high"], CALL, 3))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("nowhere",), "neither a plan book nor a bundle"),
        (("{book}", "--keys", "nowhere"), "cannot read the API keys"),
        (("{book}", "--seconds", "0"), "a limit must be positive"),
        (("{book}", "--call", '{"seed": 1}'), "not of all requests"),
    ],
)
def test_what_cannot_be_served_is_refused(
    arguments: tuple[str, ...],
    reason: str,
    book_folder: Path,
    pipeline_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(host, "log_as_json", lambda: None)
    given = [each.format(book=book_folder) if "book" in each else each for each in arguments]
    named = ["--pipeline", str(pipeline_folder), "--on", "uvicorn", "--no-warm-up"]
    monkeypatch.setattr("sys.argv", ["ditfastattn", "serve", *given, *named])
    with pytest.raises(SystemExit) as stopped:
        cli.run()
    assert stopped.value.code == 2
    assert reason in capsys.readouterr().err


def test_unknown_arguments_of_a_config_file_are_refused() -> None:
    pytest.importorskip("fastapi")
    from ditfastattn.tools.commands.serve import ray_application

    with pytest.raises(ConfigError, match="unknown limits or replicas"):
        ray_application({"source": "book", "limits": {"quality": 1}})
    with pytest.raises(ConfigError, match="args: sources"):
        ray_application({"source": "book", "sources": "book"})


@pytest.mark.slow
def test_a_bundle_is_served(tmp_path: Path, plans: dict[str, Plan]) -> None:
    torch._dynamo.reset()
    pipeline: Any = attentive_pipeline()
    ditfastattn.export(pipeline, CALL, plans["high"], tmp_path / "bundle")
    pipeline.transformer = ditfastattn.load(tmp_path / "bundle")
    with running(ImageServer(pipeline, None, name="digits")) as served:
        wanted = alone(attentive_pipeline(), plans["high"], CALL, 3)
        assert np.abs(served.ask().images[0] - wanted).max() <= 1
        assert served.ask(quality="bundled").status == 200
        assert served.ask(quality="lossless").status == 400
        found = served.ask(num_inference_steps=4)
        assert (found.status, found.error["code"]) == (400, "no_plan")
        assert np.abs(served.ask().images[0] - wanted).max() <= 1


@pytest.mark.slow
@works_with(
    "Serving",
    "a server that is killed (`kill -9`) in the middle of a generation",
    "works",
    "its book is as it was; the next server's images are right, and it ends at SIGTERM",
)
def test_a_killed_server_is_started_again_and_ends_when_it_is_told_to(
    book_folder: Path, pipeline_folder: Path, plans: dict[str, Plan]
) -> None:
    def held() -> dict[str, int]:
        return {
            str(each): each.stat().st_mtime_ns for each in [book_folder, *book_folder.iterdir()]
        }

    before = held()
    options = ("--pipeline", str(pipeline_folder), "--lowering", "eager", "--no-warm-up")
    with server_process(book_folder, options) as served:
        asked = ASK | {"num_inference_steps": 100, "n": 4}
        connection = Running(served.port).connect(json.dumps(asked).encode())
        Running(served.port).wait_for("generating_images", 1)
        served.process.kill()
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    with server_process(book_folder, options) as served:
        answer = Running(served.port).ask()
        assert np.array_equal(answer.images[0], alone(attentive_pipeline(), plans["high"], CALL, 3))
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(60) == -signal.SIGTERM
        log = served.log.read_text()
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert [line["path"] for line in lines][-1] == IMAGES
    assert held() == before
