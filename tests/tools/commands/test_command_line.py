"""What all commands have in common: exit codes, JSON, silence, a cache that lasts."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from typer.testing import CliRunner

from ditfastattn import ConfigError, EngineError, Strategy, TargetMissedError
from ditfastattn.tools.commands import app as cli
from ditfastattn.tools.commands import surroundings
from ditfastattn.tools.commands.serve import serve
from tests.helpers import tiny_digits_pipeline
from tests.plans import plan_for
from tests.tools.test_figures import make_plan

CACHE = "TORCHINDUCTOR_CACHE_DIR"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let each test begin without what the command line sets."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY", CACHE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("bad", remedy="mend it"), 2),
        (TargetMissedError("missed"), 1),
        (EngineError("failed"), 1),
        (RuntimeError("a bug"), 70),
    ],
)
def test_each_kind_of_failure_has_an_exit_code(
    error: Exception,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(SystemExit) as stopped:
        cli.run()
    assert stopped.value.code == code
    assert "error: " in capsys.readouterr().err


def test_exit_codes_are_in_the_help() -> None:
    shown = CliRunner().invoke(cli.app, ["--help"]).output
    for code in ("0 ", "1 ", "2 ", "70 ", "130 "):
        assert f"{code} " in shown


def test_an_error_fits_on_a_screen_with_its_remedy() -> None:
    error = ConfigError("bad", got="x" * 9999, remedy="mend it")
    shown = cli.one_screen(str(error))
    assert len(shown) < 600
    assert "remedy:   mend it" in shown


@pytest.mark.parametrize("command", ["inspect", "doctor"])
def test_json_is_all_that_standard_output_holds(command: str, tmp_path: Path) -> None:
    make_plan(sites=2, steps=5).save(tmp_path / "plan.json")
    arguments = [command, *([str(tmp_path / "plan.json")] if command == "inspect" else [])]
    found = CliRunner().invoke(cli.app, [*arguments, "--json"])
    assert found.exit_code == 0
    assert json.loads(found.stdout)
    assert found.stderr  # the tables


def test_every_command_takes_json() -> None:
    for command in cli.COMMANDS:
        if command is serve:  # it serves until it is stopped
            continue
        name = command.__name__.replace("_", "-")
        shown = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "200"})
        assert "--json" in shown.output, command.__name__


def test_other_libraries_are_silent_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("torchao")
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    surroundings.silence_libraries()
    assert os.environ["DIFFUSERS_VERBOSITY"] == "error"
    assert not logger.isEnabledFor(logging.WARNING)
    monkeypatch.setenv("DIFFUSERS_VERBOSITY", "info")
    surroundings.silence_libraries()
    assert os.environ["DIFFUSERS_VERBOSITY"] == "info"  # the user's choice


def test_compiled_code_is_kept_where_the_user_keeps_caches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    surroundings.keep_compiled()
    assert os.environ[CACHE] == str(tmp_path / "cache" / "ditfastattn" / "inductor")
    monkeypatch.setenv(CACHE, "elsewhere")
    surroundings.keep_compiled()
    assert os.environ[CACHE] == "elsewhere"
    monkeypatch.delenv(CACHE)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no folder can be made there
    surroundings.keep_compiled()
    assert CACHE not in os.environ


def started(words: list[str], folder: Path) -> subprocess.Popen[str]:
    """Start a command in a process of its own, which Ctrl-C ends even if it does not end us."""
    source = "from ditfastattn.tools.commands.app import run; run()"
    return subprocess.Popen(
        [sys.executable, "-c", source, *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
            "COLUMNS": "80",
        },
    )


def finished(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own to its end."""
    with started(words, folder) as process:
        out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["diff", "one.json", "one.json"], 0, "the plans do the same"),
        (["diff", "one.json", "other.json"], 1, "entries differ"),
        (["inspect", "absent.json"], 2, "remedy:   run `ditfastattn calibrate`"),
        (["calibrate", "--min-ssim", "2", "--out", "p.json"], 2, "remedy:   for example 0.95"),
        (["validate", "one.json", "--min-sim", "0.9"], 2, "--min-ssim"),
        (["doctor"], 0, "torch"),
    ],
    ids=lambda item: "-".join(item) if isinstance(item, list) else None,
)
def test_a_command_ends_with_the_documented_exit_code_and_no_traceback(
    words: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    make_plan(sites=2, steps=5).save(tmp_path / "one.json")
    make_plan(sites=2, steps=6).save(tmp_path / "other.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["ditfastattn", *words])
    with pytest.raises(SystemExit) as ended:
        cli.run()
    assert (ended.value.code or 0) == code
    shown = "".join(capfd.readouterr())
    assert said in shown
    assert "Traceback" not in shown
    if words == ["doctor"]:
        assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.slow
def test_a_shell_sees_the_exit_code_and_no_traceback(tmp_path: Path) -> None:
    done = finished(["inspect", "absent.json"], tmp_path)
    assert done.returncode == 2, done.stderr
    assert "remedy:   run `ditfastattn calibrate`" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_ctrl_c_ends_a_search_with_the_command_that_resumes_it(tmp_path: Path) -> None:
    words = ["calibrate", "--min-ssim", "0.9", "--steps", "20", "--out", "plan.json"]
    with started(words, tmp_path) as process:
        deadline = time.monotonic() + 300.0
        while not (tmp_path / "plan.json.search").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert "to resume, run: " in err
    assert "calibrate --min-ssim 0.9 --steps 20 --out plan.json" in err
    assert "Traceback" not in out + err
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.slow
def test_a_command_in_a_process_of_its_own_prints_nothing_but_json(tmp_path: Path) -> None:
    call = {"class_labels": [3], "num_inference_steps": 2, "guidance_scale": 2.0}
    pipeline: Any = tiny_digits_pipeline(DDIMScheduler(clip_sample=False))
    pipeline.save_pretrained(tmp_path / "pipeline")
    plan = plan_for(pipeline, call, [Strategy.FULL, Strategy.SHARE_STEP])
    plan.save(tmp_path / "plan.json")
    words = ["inspect", "plan.json", "--pipeline", "pipeline", "--graph", "graphs", "--json"]
    done = finished(words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passes"]
    for noise in ("float32: []", "torchao", "register_constant", "Warning"):
        assert noise not in done.stderr
