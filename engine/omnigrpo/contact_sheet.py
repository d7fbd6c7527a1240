"""A picture of probed files: the frames that are taken, and below them the waveform on the time axis."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image
from torch import Tensor

from omnigrpo.media.probe import ClipProbe, ProbedClip
from omnigrpo.probe_table import length_words, printable, reason_words, stream_words
from omnigrpo.report.theme import LIGHT, chart_style

DPI = 110
"""Pixels per inch of the written picture; all lengths below are inches."""
MOST_FILES = 100
MOST_FRAMES = 64
MARGIN = 0.35
HEADER = 0.5
TITLE = 0.34
SENTENCE_LINE = 0.19
BELOW_SENTENCE = 0.08
STAMP = 0.2
"""Room for a time stamp below a frame."""
LINK = 0.2
"""Room for the lines from frames to the time axis."""
WAVE = 0.62
TICKS = 0.3
GAP = 0.3
"""Between files."""
_LEAST_WIDTH, _MOST_WIDTH = 12.0, 40.0
_LEAST_CELL = 0.8
_FRAME_SHARE = 0.95
"""Of a cell's width that its frame may fill."""
_MOST_FRAME_HEIGHT = 1.6
_MOST_NAME = 60
_CHARACTERS_PER_INCH = 15.0
"""Of the sentences' font, by which they are wrapped."""
_TWO_PIXELS = 2 * 72 / DPI
"""In points; other widths are blurred."""
_LEAST_PEAK = 1e-3
"""Below it a waveform is silence, and not blown up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SheetRow:
    """One file, as small as it is drawn."""

    probe: ClipProbe
    thumbnails_FHWC: np.ndarray | None
    """uint8 RGB, at the size in pixels at which they are drawn."""
    peaks_2C: np.ndarray | None
    """Lowest and highest sample of each pixel column of the waveform."""


def check_sheet(path: Path, num_files: int, num_frames: int) -> None:
    """Raise ValueError for a sheet that cannot be drawn, before hours are spent on its files."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"--contact-sheet writes a PNG: give a path that ends in .png, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"--contact-sheet: the directory {path.parent} does not exist")
    if num_files > MOST_FILES:
        raise ValueError(f"a contact sheet holds at most {MOST_FILES} files, got {num_files}: draw several")
    if num_frames > MOST_FRAMES:
        raise ValueError(
            f"a contact sheet shows at most {MOST_FRAMES} frames per file, got --frames {num_frames}"
        )


def sheet_row(probed: ProbedClip) -> SheetRow:
    """What is drawn of a probed clip."""
    frames_FHWC, waveform = probed.frames_FHWC, probed.waveform
    num_frames = 1 if frames_FHWC is None else len(frames_FHWC)
    columns = round(_width(num_frames) * DPI)
    return SheetRow(
        probe=probed.probe,
        thumbnails_FHWC=None if frames_FHWC is None else _thumbnails(frames_FHWC),
        peaks_2C=None if waveform is None else _peaks(waveform.numpy(), columns),
    )


def write_contact_sheet(rows: Sequence[SheetRow], path: Path) -> None:
    """Draw the files below each other and write the PNG."""
    num_frames = max((len(row.thumbnails_FHWC) for row in rows if row.thumbnails_FHWC is not None), default=1)
    width = _width(num_frames)
    heights = [_row_height(row, width) for row in rows]
    with chart_style(LIGHT):
        sheet = _Sheet(width, HEADER + sum(heights) + GAP * len(heights))
        sheet.draw_header(rows)
        top = HEADER
        for row, height in zip(rows, heights, strict=True):
            sheet.draw_row(row, top)
            top += height + GAP
        sheet.figure.savefig(path, dpi=DPI, format="png")


class _Sheet:
    """A figure on which things are placed by their distance from its top left corner, in inches."""

    def __init__(self, width: float, height: float) -> None:
        self.width = width
        self._size = (width + 2 * MARGIN, height)
        self.figure = Figure(figsize=self._size, dpi=DPI, facecolor=LIGHT.panel)
        self._canvas = FigureCanvasAgg(self.figure)

    def draw_header(self, rows: Sequence[SheetRow]) -> None:
        num_frames = max((len(row.probe.frames.seconds) for row in rows if row.probe.frames), default=0)
        usable = sum(row.probe.is_usable for row in rows)
        files = "file" if len(rows) == 1 else "files"
        frames = (
            f", {num_frames} frames each; lines lead to where on the time axis they were taken"
            if num_frames
            else ""
        )
        self._text(0.0, 0.24, f"{usable} of {len(rows)} {files} can be used{frames}", color=LIGHT.muted)

    def draw_row(self, row: SheetRow, top: float) -> None:
        probe = row.probe
        self._rule(top - GAP / 2 + 0.02)
        self._draw_title(row, top + TITLE / 2)
        top += TITLE
        for line in _sentence(probe, self.width):
            self._text(0.0, top + SENTENCE_LINE / 2, line, color=LIGHT.rose)
            top += SENTENCE_LINE
        top = top if probe.is_usable else top + BELOW_SENTENCE
        if row.thumbnails_FHWC is not None:
            top = self._draw_frames(row.thumbnails_FHWC, probe, top)
        if row.thumbnails_FHWC is not None or row.peaks_2C is not None:
            self._draw_time(row, top)

    def _draw_title(self, row: SheetRow, middle: float) -> None:
        probe = row.probe
        name = _shortened(printable(probe.clip.path.name), _MOST_NAME)
        right = self._text(0.0, middle, name, fontsize=11, fontweight="bold")
        colour = LIGHT.green if probe.is_usable else LIGHT.rose
        right = self._text(right + 0.15, middle, str(probe.status), color=colour, fontweight="bold")
        if probe.container is not None:
            facts = [f"{probe.container} {length_words(probe)}".strip(), *stream_words(probe)]
            if row.peaks_2C is not None:
                facts.append(_loudness(row.peaks_2C))
            self._text(right + 0.15, middle, "   ".join(facts), color=LIGHT.muted)

    def _draw_frames(self, thumbnails_FHWC: np.ndarray, probe: ClipProbe, top: float) -> float:
        """Frames side by side, each above its time stamp and the start of its line; returns where the axis begins."""
        assert probe.frames is not None
        num_frames, height, width = thumbnails_FHWC.shape[:3]
        cell, bottom = self.width / num_frames, top + height / DPI
        begin, end = _time_range(probe)
        for index, (image_HWC, at) in enumerate(zip(thumbnails_FHWC, probe.frames.seconds, strict=True)):
            middle = (index + 0.5) * cell
            x, y = round((MARGIN + middle) * DPI - width / 2), round((self._size[1] - bottom) * DPI)
            self.figure.figimage(image_HWC, xo=x, yo=y, origin="upper")
            self._text(middle, bottom + STAMP / 2, f"{at:.2f} s", ha="center", fontsize=8)
            taken = (at - begin) / (end - begin) * self.width
            self._line((middle, bottom + STAMP), (taken, bottom + STAMP + LINK), LIGHT.orange)
        return bottom + STAMP + LINK

    def _draw_time(self, row: SheetRow, top: float) -> None:
        """The waveform on the time axis, and where frames were taken."""
        probe, height = row.probe, WAVE if row.peaks_2C is not None else 0.08
        begin, end = _time_range(probe)
        axes = self._axes(top, height)
        axes.set_xlim(begin, end)
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:g} s"))
        axes.tick_params(axis="x", length=3, labelsize=8, color=LIGHT.muted)
        if row.peaks_2C is not None and probe.sound_seconds is not None:
            _draw_wave(axes, row.peaks_2C, begin, begin + probe.sound_seconds)
        for at in probe.frames.seconds if probe.frames is not None else ():
            axes.axvline(at, color=LIGHT.orange, linewidth=_TWO_PIXELS)

    def _axes(self, top: float, height: float) -> Axes:
        width, total = self._size
        return self.figure.add_axes(
            (MARGIN / width, (total - top - height) / total, self.width / width, height / total)
        )

    def _text(self, x: float, middle: float, text: str, **style: Any) -> float:
        """Write one line; returns where it ends."""
        width, total = self._size
        place = ((MARGIN + x) / width, (total - middle) / total)
        settings: dict[str, Any] = {"fontsize": 9, "va": "center_baseline", "parse_math": False} | style
        artist = self.figure.text(*place, text, **settings)
        return artist.get_window_extent(self._canvas.get_renderer()).x1 / DPI - MARGIN

    def _line(self, start: tuple[float, float], stop: tuple[float, float], colour: str) -> None:
        width, total = self._size
        xs = [(MARGIN + x) / width for x, _ in (start, stop)]
        ys = [(total - y) / total for _, y in (start, stop)]
        self.figure.add_artist(Line2D(xs, ys, color=colour, linewidth=0.8, transform=self.figure.transFigure))

    def _rule(self, y: float) -> None:
        self._line((0.0, y), (self.width, y), LIGHT.line)


def _draw_wave(axes: Axes, peaks_2C: np.ndarray, begin: float, end: float) -> None:
    lowest, highest = peaks_2C
    peak = max(_peak(peaks_2C), _LEAST_PEAK)
    times = np.linspace(begin, end, peaks_2C.shape[1], endpoint=False)
    axes.fill_between(times, lowest, highest, color=LIGHT.blue, linewidth=0.4, step="post")
    axes.set_ylim(-1.05 * peak, 1.05 * peak)


def _peak(peaks_2C: np.ndarray) -> float:
    return float(np.abs(peaks_2C).max(initial=0.0))


def _loudness(peaks_2C: np.ndarray) -> str:
    peak = _peak(peaks_2C)
    return f"peak {peak:.2f}" if peak >= _LEAST_PEAK else "silence"


def _time_range(probe: ClipProbe) -> tuple[float, float]:
    """Begin and end of the time axis, in seconds after the file's first picture."""
    begin = probe.clip.start_seconds or 0.0
    ends = [begin + (probe.sound_seconds or 0.0)]
    if probe.frames is not None:
        rate = None if probe.video is None else probe.video.frames_per_second
        ends.append(probe.frames.last_seconds + 1 / (rate or 25.0))
    return begin, max(ends)


def _row_height(row: SheetRow, width: float) -> float:
    height = TITLE + SENTENCE_LINE * len(_sentence(row.probe, width))
    height += 0.0 if row.probe.is_usable else BELOW_SENTENCE
    if row.thumbnails_FHWC is not None:
        height += row.thumbnails_FHWC.shape[1] / DPI + STAMP + LINK
    if row.peaks_2C is not None:
        height += WAVE
    return height + (TICKS if row.thumbnails_FHWC is not None or row.peaks_2C is not None else 0.0)


def _sentence(probe: ClipProbe, width: float) -> list[str]:
    """Why the file cannot be used, in lines."""
    return textwrap.wrap(reason_words(probe), round(width * _CHARACTERS_PER_INCH))


def _width(num_frames: int) -> float:
    """Of the frames and the time axis."""
    return min(max(_LEAST_WIDTH, num_frames * _LEAST_CELL), _MOST_WIDTH)


def _thumbnails(frames_FHWC: Tensor) -> np.ndarray:
    num_frames, height, width = frames_FHWC.shape[:3]
    room = _width(num_frames) / num_frames * _FRAME_SHARE * DPI
    scale = min(room / width, _MOST_FRAME_HEIGHT * DPI / height)
    size = (max(1, int(width * scale)), max(1, round(height * scale)))
    images = (Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in frames_FHWC.numpy())
    return np.stack([np.asarray(image) for image in images])


def _peaks(samples: np.ndarray, columns: int) -> np.ndarray:
    """float32 ``[2, C]``: lowest and highest sample of ``C`` equal stretches, at most ``columns``."""
    edges = np.linspace(0, len(samples), min(columns, len(samples)) + 1).astype(int)[:-1]
    return np.stack([np.minimum.reduceat(samples, edges), np.maximum.reduceat(samples, edges)])


def _shortened(name: str, most: int) -> str:
    """Without its middle: what tells files apart is often at the end."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"
