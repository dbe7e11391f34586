"""Build the C++ examples."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import nlohmann_json  # type: ignore[import-untyped]  # a C++ header


def built(source: Path, folder: Path, *settings: str) -> None:
    """Build an example to ``folder``/build, as its CMakeLists.txt says; each reads JSON."""
    shutil.copytree(source, folder / "source")
    configure = ["cmake", "-S", str(folder / "source"), "-B", str(folder / "build"), *settings]
    configure.append(f"-DJSON_INCLUDE={nlohmann_json.get_include()}")
    for command in (configure, ["cmake", "--build", str(folder / "build")]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
