"""Colours of the page: CSS variables with a light and a dark value, and charts that follow them."""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any, cast

from matplotlib import rc_context
from matplotlib.figure import Figure

_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
_GROUP_IDS = re.compile(
    r' id="(?:figure|axes|patch|text|line2d|xtick|ytick|matplotlib\.axis|legend|\w+Collection)_\d+"'
)
"""Ids that every matplotlib figure repeats and nothing refers to."""
_OPENING_TAG = re.compile(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>')
_FONT = re.compile(r"font(?:-family)?: [^;\"]*?(\d+(?:\.\d+)?)px [^;\"]*")
_STAND_IN = re.compile(r"#00fe[0-9a-f]{2}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Palette:
    """Colours by role, as ``#rrggbb``."""

    ink: str
    muted: str
    line: str
    """Grid and axes."""
    blue: str
    orange: str
    green: str
    purple: str
    rose: str
    on_blue: str
    """Text on a full blue."""
    page: str
    panel: str

    def series(self, index: int) -> str:
        """Colour of the index-th line of a chart."""
        return (self.blue, self.orange, self.green, self.purple, self.rose)[index % 5]


LIGHT = Palette(
    ink="#1b1f24", muted="#5c6672", line="#dde2e8", blue="#2463a6", orange="#bf5617", green="#2a7d5c",
    purple="#7549ad", rose="#a62f5a", on_blue="#ffffff", page="#f6f7f8", panel="#ffffff",
)  # fmt: skip
DARK = Palette(
    ink="#e7eaee", muted="#9ba5b1", line="#343c47", blue="#6cb0f5", orange="#f19a62", green="#62c99d",
    purple="#b898ec", rose="#ef86ac", on_blue="#0e1319", page="#13161a", panel="#1b2026",
)  # fmt: skip

_ROLES = ("ink", "muted", "line", "blue", "orange", "green", "purple", "rose", "on_blue", "page", "panel")
VARIABLES = Palette(**{role: f"#00fe{index:02x}" for index, role in enumerate(_ROLES)})
"""Stand-ins that ``svg`` turns into the CSS variables of the same role."""


def variable(colour: str) -> str:
    """The CSS of one of the stand-ins, e.g. ``var(--blue)``."""
    return f"var(--{_ROLES[int(colour[-2:], 16)]})"


def css_variables(palette: Palette) -> str:
    """Declarations of the CSS variables with this palette's values."""
    return " ".join(f"--{role}: {getattr(palette, role)};" for role in _ROLES)


@contextmanager
def chart_style(palette: Palette, further: Mapping[str, object] | None = None) -> Iterator[None]:
    """Draw charts with the page's settings, and ``further`` ones, while the context is open."""
    settings = _settings(palette) | dict(further or {})
    with rc_context(cast("dict[Any, Any]", settings)):
        yield


def _settings(palette: Palette) -> dict[str, object]:
    return {
        "axes.axisbelow": True,
        "axes.edgecolor": palette.line,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.labelcolor": palette.muted,
        "axes.labelsize": 9,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.facecolor": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "grid.color": palette.line,
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.6,
        "svg.fonttype": "none",
        "text.color": palette.ink,
        "xtick.color": palette.muted,
        "xtick.major.size": 0,
        "ytick.color": palette.muted,
        "ytick.major.size": 0,
    }


def svg(figure: Figure, *, name: str, title: str) -> str:
    """The figure as inline SVG that scales with the page and takes its colours; ``name`` is unique on it."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = _METADATA.sub("", text)
    text = _GROUP_IDS.sub("", text)
    label = escape(title)
    text = _OPENING_TAG.sub(
        lambda match: f'<svg viewBox="{match.group(1)}" role="img" aria-label="{label}">', text, count=1
    )
    text = _FONT.sub(r"font-size: \1px", text)
    return _STAND_IN.sub(lambda match: variable(match.group()), text)
