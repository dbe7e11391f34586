"""Name the kinds of failure: the user's input, targets out of reach, engines, our own bugs."""

from __future__ import annotations


class ConfigError(ValueError):
    """Report bad input: what is wrong, where, what was got and expected, and the remedy."""

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        got: object = "",
        expected: object = "",
        remedy: str = "",
    ) -> None:
        """Compose the message from its parts; the empty ones are left out."""
        self.what, self.where = what, where
        self.got, self.expected = str(got), str(expected)
        parts = [f"{where}: {what}" if where else what]
        if got != "":
            parts.append(f"  got:      {got}")
        if expected != "":
            parts.append(f"  expected: {expected}")
        if remedy:
            parts.append(f"  remedy:   {remedy}")
        super().__init__("\n".join(parts))


class FileError(ConfigError):
    """Report a file that cannot be read or written: it is missing, the disk is full, and so on."""


class TargetMissedError(ConfigError):
    """Report a target that no plan reaches, or that a plan misses on the prompts measured."""


class VerifyError(RuntimeError):
    """Report a graph that a pass left invalid: a bug of ours, with the lines around the fault."""


class EngineError(RuntimeError):
    """Report a runtime (ONNX Runtime, TensorRT) that failed while it ran a graph."""
