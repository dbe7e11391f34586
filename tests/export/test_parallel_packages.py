"""Packages are compiled in several processes, and are what they would be if this one compiled."""

from __future__ import annotations

import threading
import zipfile
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config
from torch.export import ExportedProgram
from torch.fx import GraphModule

from ditfastattn import ConfigError
from ditfastattn.export.aoti import compilations, worker
from ditfastattn.export.aoti.checked import Compilation
from ditfastattn.export.aoti.compilations import Compilations
from ditfastattn.export.aoti.compile import compile_package
from ditfastattn.export.aoti.helper import Helper, HelperError
from ditfastattn.export.aoti.options import CompileFor, compile_for
from ditfastattn.export.aoti.program import graph_of, load_program, save_program, traced
from ditfastattn.runtime.bundle.packages import PackageInput, PackageSpec, PackageTarget


class Scaled(nn.Module):
    weight: Tensor

    def __init__(self, power: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.linspace(1, 2, 512 * 512).reshape(512, 512))
        self.power = power

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return ((x @ self.weight) ** self.power,)


TARGET = PackageTarget(torch="", device="cpu", machine="", isa="avx2", features=())
NOWHERE = CompileFor(TARGET, {"cpp.simdlen": 256})
EXAMPLE = torch.zeros(3, 512)


def program(power: int = 1) -> ExportedProgram:
    return traced(torch.fx.symbolic_trace(Scaled(power)), [EXAMPLE])


def compilation(path: Path, module: GraphModule, made: CompileFor | None = None) -> Compilation:
    layout = PackageInput(name="x", shape=(3, 512), dtype="float32", strides=(512, 1))
    spec = PackageSpec(inputs=(layout,), constants=("weight",))
    weights = {"weight": Scaled(1).weight}
    return Compilation(path, module, spec, weights, [EXAMPLE], made or NOWHERE)


class Run:
    """Compile packages by functions instead of compilers, and record who compiled which."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.here: list[str] = []
        self.by_helper: list[str] = []
        self.done: list[str] = []
        self.answer: Callable[[str], bytes] = str.encode
        self.held, self.awaited = threading.Event(), "0.pt2"
        self.accepted: Callable[[str], bool] = lambda _: True
        run = self
        self.ended = 0

        class Process:
            def compile(self, program: Path, options: Any, name: str) -> bytes:
                assert program.is_file()
                run.by_helper.append(name)
                run.held.wait(5)
                return run.answer(name)

            def end(self) -> None:
                run.ended += 1
                run.held.set()

        def compile_here(module: Any, examples: Any, options: Any, name: str) -> bytes:
            run.here.append(name)
            if name == run.awaited:  # helpers finish once this process has come so far
                run.held.set()
            return name.encode()

        def accept(self: Compilation, content: bytes) -> bool:
            assert threading.current_thread() is threading.main_thread()
            right = run.accepted(self.path.name)
            if right:
                self.path.write_bytes(content)
            return right

        monkeypatch.setattr(compilations, "Helper", Process)
        monkeypatch.setattr(compilations, "compile_package", compile_here)
        monkeypatch.setattr(Compilation, "accept", accept)

    def compile(self, count: int, helpers: int) -> None:
        with Compilations(helpers) as made:
            for index in range(count):
                name = f"{index}.pt2"
                one = program()
                made.add(
                    compilation(self.folder / name, graph_of(one)),
                    one,
                    partial(self.done.append, name),
                )
            made.finish()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path, monkeypatch)


def names(*numbers: int) -> list[str]:
    return [f"{number}.pt2" for number in numbers]


def test_a_helper_takes_the_first_and_this_process_the_last(run: Run) -> None:
    run.awaited = "3.pt2"
    run.compile(4, helpers=1)
    assert run.by_helper[0] == "1.pt2"
    assert run.here[:2] == names(0, 3)
    assert sorted(run.here + run.by_helper) == names(0, 1, 2, 3)
    assert sorted(run.done) == names(0, 1, 2, 3)
    assert {path.name: path.read_text() for path in run.folder.iterdir()} == {
        name: name for name in names(0, 1, 2, 3)
    }
    assert run.ended == 1


@pytest.mark.parametrize(("count", "helpers"), [(1, 3), (3, 0)])
def test_one_package_or_one_core_starts_no_helper(count: int, helpers: int, run: Run) -> None:
    run.compile(count, helpers)
    assert run.here == run.done == names(*range(count))
    assert run.ended == 0


def test_what_a_helper_cannot_do_is_done_here(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    def fail(name: str) -> bytes:
        raise HelperError("its process ended (-9)")

    run.answer = fail
    run.compile(2, helpers=1)
    assert run.here == names(0, 1)
    assert sorted(run.done) == names(0, 1)
    assert "1.pt2: a helper failed, it is compiled here: its process ended (-9)" in caplog.text


def test_an_error_of_a_helper_is_raised_and_ends_the_others(run: Run) -> None:
    def refuse(name: str) -> bytes:
        raise ConfigError("torch cannot compile the graph", where=name, got="no operator")

    run.answer = refuse
    with pytest.raises(ConfigError, match=r"1.pt2: torch cannot(.|\n)*got: *no operator"):
        run.compile(2, helpers=1)
    assert run.ended == 1


def test_an_interrupt_ends_the_helpers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(compilations, "compile_package", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.compile(3, helpers=2)
    assert run.ended >= 1
    assert not list(run.folder.iterdir())


def test_wrong_code_of_a_helper_is_compiled_again(run: Run) -> None:
    tried: list[str] = []

    def accepted(name: str) -> bool:
        tried.append(name)
        return tried.count("1.pt2") != 1

    run.accepted = accepted
    run.compile(2, helpers=1)
    assert sorted(tried) == ["0.pt2", "1.pt2", "1.pt2"]
    assert sorted(run.done) == names(0, 1)


def test_a_program_travels_without_its_weights(tmp_path: Path) -> None:
    made, path = program(), tmp_path / "program.pt2"
    before = graph_of(made)(torch.ones(3, 512))[0]
    save_program(made, path)
    assert path.stat().st_size < 100_000 < made.state_dict["weight"].nbytes
    assert torch.equal(graph_of(made)(torch.ones(3, 512))[0], before)  # it is as it was
    loaded = load_program(path)
    assert loaded.state_dict["weight"].shape == (512, 512)
    assert str(graph_of(loaded).graph) == str(graph_of(made).graph)
    path.write_bytes(b"no program")
    request = {"program": str(path), "package": "", "options": {}, "where": "x.pt2"}
    assert set(worker.answer(request)) == {"failed"}


def test_an_ended_helper_says_so(tmp_path: Path) -> None:
    helper = Helper()
    helper.end()
    with pytest.raises(HelperError, match="its process ended"):
        helper.compile(tmp_path / "program.pt2", {}, "x.pt2")


def test_helpers_are_limited_by_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, memory, expected in ((1, 2**40, 0), (4, 2**40, 3), (4, 2 * 2**31, 2), (4, 0, 0)):
        monkeypatch.setattr(compilations, "available_memory", partial(int, memory))
        with config.patch(compile_threads=cores):
            assert HELPER_COUNT() == expected


HELPER_COUNT = compilations.helper_count  # before it is replaced for all tests


@pytest.mark.slow
def test_a_helper_compiles_what_this_process_would(tmp_path: Path) -> None:
    one, path, options = program(), tmp_path / "one.pt2", compile_for(torch.device("cpu")).options
    save_program(one, path)
    helper = Helper()
    try:
        found = helper.compile(path, options, "one")
    finally:
        helper.end()
    assert library(found) == library(compile_package(graph_of(one), [EXAMPLE], options, "one"))


def library(package: bytes) -> bytes:
    with zipfile.ZipFile(BytesIO(package)) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".so")]
        return archive.read(name)
