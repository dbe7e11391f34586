"""Compile packages for another process: see ``helper``.

It reads requests from its standard input, a line of JSON each, and answers each by one. It ends
with its input, and so with the process that started it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from ditfastattn.core.errors import ConfigError
from ditfastattn.export.aoti.compile import compile_package
from ditfastattn.export.aoti.program import example_inputs, graph_of, load_program


def main() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what compilers print is not an answer
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


def answer(request: dict[str, Any]) -> dict[str, str]:
    """Compile the program at ``program`` to the file ``package``; return what was wrong, if any."""
    try:
        program = load_program(Path(request["program"]))
        content = compile_package(
            graph_of(program), example_inputs(program), request["options"], request["where"]
        )
        Path(request["package"]).write_bytes(content)
    except ConfigError as error:
        return {"refused": str(error)}
    except Exception as error:  # what this process cannot do, the one that asks may
        return {"failed": f"{type(error).__name__}: {error}"}
    return {}


if __name__ == "__main__":
    main()
