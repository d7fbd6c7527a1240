"""An emotion wheel's look-ups, and sets of its nodes as bit masks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from omnigrpo.emotion_wheel.tables import LEVELS, Level, Wheel, WheelError, WheelTables

_WORD_BITS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeSets:
    """For some samples, which nodes of each wheel their labels name."""

    masks_NW: np.ndarray
    """uint64 [N samples, W wheels]: one bit per node; 0 where no label is on the wheel."""


class EmotionWheel:
    """Look-ups by label, in lower case without white space around it; a label in no table names nothing."""

    def __init__(self, tables: WheelTables) -> None:
        """Raises WheelError for a wheel with more than 64 nodes on a level."""
        self.tables = tables
        self.content_hash = tables.content_hash
        self._masks = {level: _LabelMasks(tables, level) for level in LEVELS}

    @property
    def num_wheels(self) -> int:
        """W."""
        return len(self.tables.wheels)

    def base_word(self, label: str) -> str | None:
        """The first base word of a label, in alphabetical order (F_l1); None out of vocabulary."""
        bases = self.tables.forms.get(label)
        return bases[0] if bases else None

    def wheel_word(self, label: str) -> str | None:
        """The first wheel word of the label's first base word (F_l2 after F_l1); None out of vocabulary."""
        base = self.base_word(label)
        words = self.tables.synonyms.get(base) if base is not None else None
        return words[0] if words else None

    def nodes(self, label: str, level: Level = "level1") -> tuple[str | None, ...]:
        """On every wheel the node of a label; None where it is on none (F_l3 over all its base and wheel words)."""
        words = _wheel_words(self.tables, label)
        return tuple(_first_node(words, wheel, level) for wheel in self.tables.wheels)

    def is_known(self, label: str) -> bool:
        """Whether the label is a form of any base word, on a wheel or not."""
        return label in self.tables.forms

    def node_sets(self, labels: Sequence[Iterable[str]], level: Level = "level1") -> NodeSets:
        """Nodes of every sample's labels; labels in any case."""
        return NodeSets(masks_NW=self._masks[level].of(labels))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a wheel's nodes are in a label's packed words."""

    word: int
    shift: int
    bits: dict[str, int]
    """Node -> its bit, counted from 0."""


class _LabelMasks:
    """Bit masks of every surface form on one level, all wheels packed into as few 64-bit words as hold them."""

    def __init__(self, tables: WheelTables, level: Level) -> None:
        self._places = _places(tables.wheels, level)
        num_words = 1 + max((place.word for place in self._places), default=0)
        rows_KL = np.zeros((num_words, len(tables.forms) + 1), dtype=np.uint64)
        self._row_of = _RowIndex()
        for row, form in enumerate(tables.forms, start=1):
            self._row_of[form] = row
            words = _wheel_words(tables, form)
            for wheel, place in zip(tables.wheels, self._places, strict=True):
                node = _first_node(words, wheel, level)
                if node is not None:
                    rows_KL[place.word, row] |= np.uint64(1 << (place.shift + place.bits[node]))
        self._rows_KL = rows_KL

    def of(self, labels: Sequence[Iterable[str]]) -> np.ndarray:
        """uint64 [N, W]."""
        row_of = self._row_of.__getitem__
        flat: list[int] = []
        starts: list[int] = []
        for sample in labels:
            starts.append(len(flat))
            flat.append(0)  # The empty mask, so that no sample is empty.
            flat.extend(map(row_of, sample))
        if not starts:
            return np.zeros((0, len(self._places)), dtype=np.uint64)
        packed_KN = [np.bitwise_or.reduceat(words_L[flat], starts) for words_L in self._rows_KL]
        return np.stack([_unpacked(packed_KN[place.word], place) for place in self._places], axis=1)


class _RowIndex(dict[str, int]):
    """Row of a label; of one in another case or with white space, that of its normal form; 0 for the unknown."""

    def __missing__(self, label: str) -> int:
        return self.get(label.strip().lower(), 0)


def _wheel_words(tables: WheelTables, label: str) -> list[str]:
    """All wheel words of all base words, in alphabetical order."""
    bases = tables.forms.get(label, ())
    return sorted({word for base in bases for word in tables.synonyms.get(base, ())})


def _first_node(words: Iterable[str], wheel: Wheel, level: Level) -> str | None:
    nodes = wheel.nodes(level)
    return next((nodes[word] for word in words if word in nodes), None)


def _places(wheels: Sequence[Wheel], level: Level) -> list[_Place]:
    places: list[_Place] = []
    word = shift = 0
    for wheel in wheels:
        nodes = sorted(set(wheel.nodes(level).values()))
        if len(nodes) > _WORD_BITS:
            raise WheelError(
                f"{wheel.name} has {len(nodes)} nodes on {level}, more than {_WORD_BITS}: split it into two wheels"
            )
        if shift + len(nodes) > _WORD_BITS:
            word, shift = word + 1, 0
        places.append(_Place(word=word, shift=shift, bits={node: bit for bit, node in enumerate(nodes)}))
        shift += len(nodes)
    return places


def _unpacked(words_N: np.ndarray, place: _Place) -> np.ndarray:
    return (words_N >> np.uint64(place.shift)) & np.uint64((1 << len(place.bits)) - 1)
