"""The three look-ups from a label to the nodes of emotion wheels, as data, and the compact file that holds them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

Level = Literal["level1", "level2"]
"""Innermost ring of a wheel, and the ring around it."""
LEVELS: tuple[Level, ...] = ("level1", "level2")
FORMAT = "omnigrpo-emotion-wheel-1"


class WheelError(ValueError):
    """Emotion-wheel tables that cannot be used; names the file and the row, column or key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wheel:
    """One emotion wheel: of every word on it, the node that stands for it on each level."""

    name: str
    level1: Mapping[str, str]
    level2: Mapping[str, str]

    def nodes(self, level: Level) -> Mapping[str, str]:
        """Wheel word -> node."""
        return self.level1 if level == "level1" else self.level2


@dataclass(frozen=True, kw_only=True, slots=True)
class WheelTables:
    """Surface form -> base words -> wheel words -> nodes (OV-MERD's F_l1, F_l2 and F_l3; AffectGPT, section 4)."""

    forms: Mapping[str, tuple[str, ...]]
    """Base words of every surface form, the base word's own included; sorted."""
    synonyms: Mapping[str, tuple[str, ...]]
    """Wheel words of every base word; sorted."""
    wheels: tuple[Wheel, ...]

    @property
    def content_hash(self) -> str:
        """Hex SHA-256 of the content, to be recorded with every score."""
        return hashlib.sha256(_canonical(self)).hexdigest()

    def save(self, path: Path) -> None:
        """Write the compact file: JSON without white space, keys in order."""
        path.write_bytes(_canonical(self))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a compact file.

        Raises:
            WheelError: no such file, or one that ``save`` did not write.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise WheelError(f"emotion-wheel file {path} does not exist: check the path") from None
        except ValueError as error:
            raise WheelError(f"{path} is not valid JSON: {error}; {_BUILD}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise WheelError(f"{path} is no {FORMAT} file; {_BUILD}")
        try:
            return cls(
                forms={form: tuple(bases) for form, bases in content["forms"].items()},
                synonyms={base: tuple(words) for base, words in content["synonyms"].items()},
                wheels=tuple(Wheel(**wheel) for wheel in content["wheels"]),
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise WheelError(f"{path} is damaged ({error}); {_BUILD}") from error


_BUILD = "build one with `omnigrpo wheel build`"


def _canonical(tables: WheelTables) -> bytes:
    content = {
        "format": FORMAT,
        "forms": dict(tables.forms),
        "synonyms": dict(tables.synonyms),
        "wheels": [
            {"name": wheel.name, **{level: dict(wheel.nodes(level)) for level in LEVELS}}
            for wheel in tables.wheels
        ],
    }
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
