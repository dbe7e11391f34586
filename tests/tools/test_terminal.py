"""What is printed is what was meant: brackets, emoji codes and dollars in names are text."""

from __future__ import annotations

import ast
import inspect
import logging
import signal
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from rich.text import Text
from typer.testing import CliRunner

import ditfastattn
from ditfastattn import ConfigError, Plan, Target, Validation
from ditfastattn.passes.plan.calibration import Measured, PlannedTarget
from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.search.judge.drift import Drift
from ditfastattn.runtime.search.judge.quality import Quality
from ditfastattn.runtime.search.record.work import SearchProgress
from ditfastattn.tools import terminal
from ditfastattn.tools.bench.report import show
from ditfastattn.tools.commands import app as cli
from ditfastattn.tools.commands import doctor as doctor_command
from ditfastattn.tools.commands import verify as verify_command
from ditfastattn.tools.commands.doctor import Finding
from tests.helpers import tiny_digits_pipeline
from tests.tools.test_figures import make_plan

# Rich drops the first as a tag, refuses the last as one that was never opened, and replaces the
# code between them by a picture.
NAME = "a[onnx]:smile:[/x]"


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder whose path ends in the name: its slash separates two folders."""
    found = tmp_path / NAME
    found.mkdir(parents=True)
    return found


@pytest.fixture
def pipeline(folder: Path) -> Path:
    made: Any = tiny_digits_pipeline(DDIMScheduler(clip_sample=False))
    made.save_pretrained(folder)
    return folder


def named_plan() -> Plan:
    """Return a plan all of whose names are the name."""
    plan = make_plan(2, 4)
    measured = Measured(prompts=1, worst=1.0, mean=1.0)
    calibration = plan.calibration.model_copy(
        update={
            "target": PlannedTarget(name=NAME, bound=1.0, at_least=True),
            "calibrated": measured,
            "device": NAME,
            "measured_speedup": 1.0,
            "measured_seconds": 1.0,
        }
    )
    return plan.model_copy(
        update={
            "sampler": plan.sampler.model_copy(update={"scheduler": NAME}),
            "sites": tuple(
                site.model_copy(update={"name": f"{site.name} {NAME}"}) for site in plan.sites
            ),
            "calibration": calibration,
        }
    )


def run(*arguments: object) -> str:
    """Run a command that is to succeed; return what it printed."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_doctor_prints_whole_install_commands_at_80_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor_command, "_version", lambda name: "")
    monkeypatch.setenv("COLUMNS", "80")
    shown = run("doctor")
    for extra in ("onnx", "tensorrt", "tensorrt-rtx", "bench"):
        assert f'pip install "ditfastattn[{extra}]"' in shown


def test_doctor_shows_reasons_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Finding(f"part {NAME}", f"1{NAME}", f"do {NAME}", f"not {NAME}", f"install {NAME}")
    monkeypatch.setattr(doctor_command, "examine", lambda: [found])
    shown = run("doctor")
    for text in (f"part {NAME}", f"1{NAME}", f"do {NAME}", f"not {NAME}", f": install {NAME}"):
        assert text in shown


def test_inspect_shows_names_as_they_are(folder: Path) -> None:
    named_plan().save(folder / "plan.json")
    shown = run("inspect", folder / "plan.json")
    assert f"{NAME}/plan.json" in shown
    assert f"{NAME}, 4 steps" in shown
    assert f"measured on {NAME}" in shown
    assert f"{NAME} >= 1" in shown
    sites = [line for line in shown.splitlines() if "self" in line]
    assert len(sites) == 2
    assert all(NAME in line for line in sites)


def test_calibrate_shows_names_as_they_are(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def calibrate(*_: Any, on_progress: Any, **__: Any) -> Plan:
        on_progress(SearchProgress(f"searching {NAME}", 1.0, 2.0, 3.0))
        return named_plan()

    monkeypatch.setattr(ditfastattn, "calibrate", calibrate)
    shown = run("calibrate", "--pipeline", pipeline, "--out", pipeline / "plan.json")
    assert f"target: {NAME} >= 1" in shown
    assert f"wrote {pipeline / 'plan.json'}" in shown


def test_validate_shows_names_as_they_are(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closeness(_dense: Any, _planned: Any) -> Any: ...

    closeness.__name__ = NAME
    made = Validation(
        target=Target.quality(closeness, at_least=1.0),
        seeds=(1,),
        qualities=(Quality(NAME, f"label {NAME}", "", True, (1.0,)),),
        drift=Drift(plan=3e-4),
        timing=None,
        lowering=Lowering.EAGER,
    )

    def validate(*_: Any, on_progress: Any, **__: Any) -> Validation:
        on_progress(f"generating {NAME}")
        return made

    monkeypatch.setattr(ditfastattn, "validate", validate)
    named_plan().save(pipeline / "plan.json")
    out = pipeline / "found.json"
    shown = run("validate", pipeline / "plan.json", "--pipeline", pipeline, "--out", out)
    assert f"label {NAME}" in shown
    assert f"target: {NAME}" in shown
    assert f"wrote {out}" in shown


def test_export_and_build_show_names_as_they_are(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(*_: Any, on_progress: Any, **__: Any) -> Any:
        on_progress(f"writing {NAME}", 1, 2)
        files = {"weights.bin": types.SimpleNamespace(bytes=1)}
        return types.SimpleNamespace(
            files=files,
            weights="weights.bin",
            variants=(),
            schedule=(),
            model_dump=lambda mode: {},
        )

    def build(*_: Any, on_progress: Any, **__: Any) -> Any:
        on_progress(NAME, f"parsing {NAME}", 0.5)
        content = types.SimpleNamespace(bytes=1)
        spec = types.SimpleNamespace(
            graph=NAME, content=content, attentions=1, fused=1, seconds=1.0, findings=(NAME,)
        )
        return types.SimpleNamespace(
            target=NAME,
            library=NAME,
            version=NAME,
            engines=(spec,),
            layout=types.SimpleNamespace(value=NAME),
            reason=NAME,
        )

    monkeypatch.setattr(ditfastattn, "export", export)
    monkeypatch.setattr(ditfastattn, "build", build)
    bundle = pipeline / "bundle"
    shown = run("export", "--pipeline", pipeline, "--out", bundle, "--tensorrt")
    assert f"wrote {bundle}: " in shown
    assert f"engines for {NAME}, {NAME} {NAME}" in " ".join(shown.split())  # a title is wrapped
    assert f"{NAME}: {NAME}" in shown
    assert f"layout {NAME}: {NAME}" in shown
    assert f"wrote {bundle / 'engines' / NAME}" in shown


def test_verify_shows_names_as_they_are(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = types.SimpleNamespace(
        variant_errors={NAME: 0.0},
        bounds=(1.0, 1.0),
        psnr=2.0,
        loop_error=0.0,
        latents_error=0.0,
        passed=True,
    )
    fingerprint = types.SimpleNamespace(dtype="float32")
    model = types.SimpleNamespace(fingerprint=fingerprint)
    read = types.SimpleNamespace(plan_sha256="", model=model)
    monkeypatch.setattr(verify_command, "read_manifest", lambda _: read)
    monkeypatch.setattr(ditfastattn, "verify", lambda *_, **__: found)
    assert NAME in run("verify", pipeline, "--pipeline", pipeline)


def test_bench_shows_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    speedup = {"median": 1.0, "lower_quartile": 1.0, "upper_quartile": 1.0}
    numbers = {"ssim": 1.0, "worst_ssim": 1.0, "psnr": 1.0, "compile_seconds": 1.0}
    numbers |= {"psnr_standard_error": 0.1, "worst_psnr": 1.0}
    named = {"method": f"method {NAME}", "setting": f"setting {NAME}", "form": "eager"}
    best = {"method": f"best {NAME}", "setting": NAME, "speedup": 1.0}
    show(
        terminal.open_console(),
        {
            "model": NAME,
            "steps": 1,
            "repetitions": 1,
            "weights": "trained",
            "lanes": [{**named, **numbers, "speedup": speedup}],
            "failures": [{"method": NAME, "setting": NAME, "reason": f"reason {NAME}"}],
            "seeds": [0],
            "best": [{"metric": "ssim", "level": 0.9, "ours": None, "peer": best, "fewer": None}],
        },
    )
    shown = capsys.readouterr().out
    for text in ("method", "setting", "reason", "best"):
        assert f"{text} {NAME}" in shown


def test_errors_and_logs_show_names_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ConfigError(NAME, where=NAME, got=NAME, expected=NAME, remedy=NAME)

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit):
        cli.run()
    assert capsys.readouterr().err.count(NAME) == 5
    cli.set_up_logging(1)
    logging.getLogger("ditfastattn.x").warning("%s: declined", NAME)
    assert f"{NAME}: declined" in capsys.readouterr().err


TOOLS = Path(terminal.__file__).parent
HARMLESS = {  # what other modules may take from rich: a console shows these as they are
    "rich.console": {"Console"},  # to name the type only
    "rich.logging": {"RichHandler"},
    "rich.table": {"Table"},
    "rich.text": {"Text"},
}


def parsed_by_rich(node: ast.AST) -> bool:
    """Tell whether a line of the tools' source may let rich parse a string as markup."""
    if isinstance(node, ast.Import):
        return any(name.name.partition(".")[0] == "rich" for name in node.names)
    if isinstance(node, ast.ImportFrom):
        module = node.module or ""
        taken = {name.name for name in node.names}
        return module.partition(".")[0] == "rich" and not taken <= HARMLESS.get(module, set())
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        asked = any(keyword.arg == "markup" for keyword in node.keywords)
        return asked or called == "Console" or called.endswith((".status", ".from_markup"))
    return False


@pytest.mark.parametrize(
    ("source", "parsed"),
    [
        ("import rich", True),
        ("from rich.progress import Progress", True),
        ("from rich import print", True),
        ("Console(stderr=True)", True),
        ("console.status('a')", True),
        ("console.print('a', markup=True)", True),
        ("from rich.table import Table", False),
        ("console.print('a')", False),
    ],
)
def test_what_may_let_rich_parse_a_string_is_recognised(source: str, parsed: bool) -> None:
    assert any(map(parsed_by_rich, ast.walk(ast.parse(source)))) is parsed


def test_only_the_terminal_module_opens_consoles_bars_and_spinners() -> None:
    found = [
        f"{path.relative_to(TOOLS)}: {ast.unparse(node)}"
        for path in TOOLS.rglob("*.py")
        if path != Path(terminal.__file__)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if parsed_by_rich(node)
    ]
    assert found == []


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.__name__)
def test_help_texts_survive_typers_markup_parser(command: Callable[..., None]) -> None:
    hints = get_type_hints(command, include_extras=True).values()
    options = [item for hint in hints for item in getattr(hint, "__metadata__", ())]
    texts = [inspect.getdoc(command) or "", *(option.help for option in options)]
    assert [Text.from_markup(text).plain for text in texts] == texts


class Swallows:
    """Is interrupted as it dies, where Python drops exceptions."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_ctrl_c_that_was_swallowed_ends_the_work_at_its_next_progress() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as processes begin
    try:
        with terminal.progress_bar(terminal.open_console(), "searching") as advance:
            advance("searching", 0.2)
            Swallows()
            with pytest.raises(KeyboardInterrupt):
                advance("searching", 0.5)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
