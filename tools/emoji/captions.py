"""The captions of the emoji model: a thing, the hue of the ground, which way the thing faces.

    a panda on blue
    an elephant on pink, facing right

The vocabulary is closed. A caption is three words: those of `Vocabulary.words`, or the null word
three times for the unconditional branch of guidance.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ditfastattn.core.errors import ConfigError

DEFAULT_FACING = "left"
CAPTION_LENGTH = 3
_CAPTION = re.compile(
    r"\s*(?:an?\s+|the\s+)?(?P<thing>[\w-]+)\s+on\s+(?:an?\s+)?(?P<hue>[\w-]+)(?:\s+ground)?"
    r"(?:\s*,?\s*facing\s+(?P<facing>[\w-]+))?\s*\.?\s*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Caption:
    """What a picture shows: ``thing``, ``hue`` and ``facing`` are words of a vocabulary."""

    thing: str
    hue: str
    facing: str = DEFAULT_FACING

    def __str__(self) -> str:
        """Return the caption as a sentence that `Vocabulary.parse` reads."""
        article = "an" if self.thing[0] in "aeio" else "a"  # "a unicorn"
        return f"{article} {self.thing} on {self.hue}, facing {self.facing}"


@dataclass(frozen=True)
class Vocabulary:
    """The words of captions, by kind; a word's number is its place in ``words``."""

    things: tuple[str, ...]
    hues: tuple[str, ...]
    facings: tuple[str, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """Return all words, without the null word."""
        return self.things + self.hues + self.facings

    @property
    def null(self) -> int:
        """Return the number of the null word."""
        return len(self.words)

    def captions(self) -> list[Caption]:
        """Return every caption there is."""
        return [
            Caption(thing, hue, facing)
            for thing in self.things
            for hue in self.hues
            for facing in self.facings
        ]

    def tokens(self, caption: Caption) -> list[int]:
        """Return the numbers of the three words of ``caption``."""
        hue = len(self.things) + self.hues.index(caption.hue)
        facing = len(self.things) + len(self.hues) + self.facings.index(caption.facing)
        return [self.things.index(caption.thing), hue, facing]

    def null_tokens(self) -> list[int]:
        """Return the numbers of the null caption."""
        return [self.null] * CAPTION_LENGTH

    def parse(self, text: object, where: str = "prompt") -> Caption:
        """Return the caption that ``text`` says.

        Raises:
            ConfigError: ``text`` is not a caption, or a word is not in the vocabulary.
        """
        found = _CAPTION.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ConfigError(
                "the prompt is not a caption that the model reads",
                where=where,
                got=repr(text),
                expected="THING on HUE, or THING on HUE, facing left or right",
                remedy=f"write it like 'a {self.things[0]} on {self.hues[0]}'",
            )
        return Caption(
            self._known(found["thing"], "thing", self.things, where),
            self._known(found["hue"], "hue", self.hues, where),
            self._known(found["facing"] or DEFAULT_FACING, "direction", self.facings, where),
        )

    def _known(self, word: str, kind: str, known: Sequence[str], where: str) -> str:
        word = word.lower()
        if word in known:
            return word
        close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
        raise ConfigError(
            f"the model knows no such {kind}",
            where=where,
            got=repr(word),
            expected=", ".join(known),
            remedy=f"did you mean {close[0]!r}?" if close else f"choose one of the {kind}s above",
        )
