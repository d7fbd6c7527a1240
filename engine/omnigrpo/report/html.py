"""Small pieces of HTML; every text that goes in is escaped here."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True, slots=True)
class Markup:
    """Text that is HTML already."""

    html: str


Cell = str | Markup

NOTHING = "\N{EN DASH}"
"""Stands where there is no value."""


def text(value: Cell) -> str:
    """Escaped, unless it is HTML already."""
    return value.html if isinstance(value, Markup) else escape(value)


def section(identifier: str, title: str, body: str, note: str = "") -> str:
    """A section with a heading and, below it, a sentence that says how to read it."""
    lead = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<section id="{identifier}"><h2>{escape(title)}</h2>{lead}{body}</section>'


def missing(what: str) -> str:
    """A line that tells what is not there."""
    return f'<p class="missing">{escape(what)}</p>'


def table(header: Sequence[Cell], rows: Iterable[Sequence[Cell]], *, numeric_from: int = 1) -> str:
    """A table that scrolls sideways by itself; columns from ``numeric_from`` on are aligned right."""

    def cells(tag: str, row: Sequence[Cell]) -> str:
        return "".join(
            f"<{tag}{' class=num' if index >= numeric_from else ''}>{text(cell)}</{tag}>"
            for index, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    head = f"<tr>{cells('th', header)}</tr>"
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def figure(title: str, picture: str, legend: Sequence[tuple[str, str]] = ()) -> str:
    """A titled chart; the legend pairs a label with the CSS of its swatch."""
    entries = "".join(f'<span class="key">{swatch(css)}{escape(label)}</span>' for label, css in legend)
    keys = f'<div class="keys">{entries}</div>' if entries else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{keys}{picture}</figure>"


def swatch(css: str) -> str:
    """A small square of colour."""
    return f'<i class="swatch" style="{css}"></i>'


def details(summary: str, body: str) -> str:
    """A part that is folded away."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def percent(value: float | None, *, digits: int = 1) -> str:
    """A fraction as a percentage; a dash for None."""
    return NOTHING if value is None else f"{100 * value:.{digits}f}"
