"""From the rows of a wheel's table to the node of every word."""

from collections.abc import Iterable

from omnigrpo.emotion_wheel.tables import Wheel, WheelError

Row = tuple[str, str, str]
"""A table's row from the innermost ring outwards; an empty cell repeats the one above."""


def wheel_from_rows(name: str, rows: Iterable[Row]) -> Wheel:
    """Build a wheel.

    Level 1: every word of a sector stands for the sector's innermost word. Level 2: an outer word stands for the
    middle word it belongs to; the innermost word for the first of its middle words in alphabetical order. Where a word
    has several places the last sector wins, as in the reference.

    Raises:
        WheelError: no rows, a first row with an empty cell, a sector without middle or outer words, or a word that is
            its own ancestor.
    """
    sectors = _sectors(name, rows)
    _check_acyclic(name, sectors)
    level1: dict[str, str] = {}
    level2: dict[str, str] = {}
    for inner, middles in sectors.items():
        level1[inner], level2[inner] = inner, min(middles)
        for middle, outers in middles.items():
            level1[middle], level2[middle] = inner, middle
            for outer in outers:
                level1[outer], level2[outer] = inner, middle
    return Wheel(name=name, level1=level1, level2=level2)


def _sectors(name: str, rows: Iterable[Row]) -> dict[str, dict[str, list[str]]]:
    sectors: dict[str, dict[str, list[str]]] = {}
    above: Row | None = None
    for number, row in enumerate(rows, start=2):  # Row 1 is the header.
        cells = [cell.strip().lower() for cell in row]
        if not any(cells):
            continue
        place = f"{name}, row {number}"
        if above is None and not all(cells):
            raise WheelError(f"{place}: the first row must fill level1, level2 and level3, got {tuple(row)}")
        _check_new_sector(cells, place)
        inner, middle, outer = (cell or old for cell, old in zip(cells, above or ("", "", ""), strict=True))
        above = (inner, middle, outer)
        sectors.setdefault(inner, {}).setdefault(middle, []).append(outer)
    if not sectors:
        raise WheelError(f"{name} has no rows: a wheel needs at least one sector")
    return sectors


def _check_new_sector(cells: list[str], place: str) -> None:
    """A row that opens a sector or a middle word must fill what is outside it, or it would take a neighbour's words."""
    for depth in (0, 1):
        if cells[depth] and not all(cells[depth + 1 :]):
            raise WheelError(
                f"{place}: the sector {cells[depth]!r} is empty; give level{depth + 2} in the same row"
            )


def _check_acyclic(name: str, sectors: dict[str, dict[str, list[str]]]) -> None:
    """Raise WheelError when going inwards from a word can come back to it; a word beside itself is one node."""
    inwards: dict[str, set[str]] = {}
    for inner, middles in sectors.items():
        for middle, outers in middles.items():
            inwards.setdefault(middle, set()).add(inner)
            for outer in outers:
                inwards.setdefault(outer, set()).add(middle)
    for word in sorted(inwards):
        path = _way_back(word, word, inwards, (word,))
        if path is not None:
            raise WheelError(f"{name} has a cycle: {' -> '.join(path)}; a word cannot be inside itself")


def _way_back(
    word: str, start: str, inwards: dict[str, set[str]], path: tuple[str, ...]
) -> tuple[str, ...] | None:
    for parent in sorted(inwards.get(word, ())):
        if parent == word:
            continue
        if parent == start:
            return (*path, start)
        if parent not in path and (found := _way_back(parent, start, inwards, (*path, parent))):
            return found
    return None
