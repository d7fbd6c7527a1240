import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from omnigrpo.report.charts import binned, draw_lengths, phase_fills, running_mean
from omnigrpo.report.figures import summary_picture
from omnigrpo.report.theme import DARK, LIGHT, Palette
from omnigrpo.runtime.spans import Phase

WriteRun = Callable[..., Path]


def test_short_series_are_left_alone() -> None:
    steps, values = binned([1, 2, 3], [1.0, math.nan, 3.0], 3)
    assert steps.tolist() == [1, 2, 3]
    assert values[0] == 1
    assert math.isnan(values[1])


def test_long_series_keep_their_mean_and_their_gaps() -> None:
    values = [float(i) for i in range(1000)]
    values[5] = math.nan
    values[500:510] = [math.nan] * 10
    steps, means = binned(range(1000), values, 100)
    assert len(steps) == len(means) == 100
    assert means[0] == pytest.approx((45 - 5) / 9)
    assert math.isnan(means[50])


def test_the_running_mean_of_a_line_is_the_line_away_from_its_ends() -> None:
    line = np.arange(20.0)
    assert running_mean(line, 5)[2:-2] == pytest.approx(line[2:-2])
    assert running_mean(np.array([1.0, math.nan, 3.0]), 3).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "lengths", [[1, 1, 2, 1, 3], [512] * 9 + [40], [0], [7], list(range(100)), [39], [40]]
)
def test_every_length_is_counted_in_a_bar_that_holds_it(lengths: list[int]) -> None:
    axes = Figure().subplots()
    draw_lengths(axes, lengths, LIGHT)
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert sum(bar.get_height() for bar in bars) == len(lengths)
    assert len(bars) <= 41
    for length in lengths:
        assert any(
            bar.get_x() - 1 <= length <= bar.get_x() + bar.get_width() + 1 for bar in bars if bar.get_height()
        )
    (median,) = (line.get_xdata()[0] for line in axes.lines)  # type: ignore[index] - a sequence
    assert median == np.median(lengths)


def test_every_phase_has_a_fill_of_its_own() -> None:
    fills = phase_fills(LIGHT)
    assert set(fills) >= {str(phase) for phase in Phase}
    assert len(set(fills.values())) == len(fills)


def contrast(first: str, second: str) -> float:
    """WCAG contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("role", ["ink", "muted", "blue", "orange", "green", "purple", "rose"])
def test_text_and_lines_can_be_told_from_the_background(palette: Palette, role: str) -> None:
    assert min(contrast(getattr(palette, role), ground) for ground in (palette.page, palette.panel)) >= 4.0


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_counts_can_be_read_on_a_full_cell(palette: Palette) -> None:
    assert contrast(palette.blue, palette.on_blue) >= 4.5


def test_the_summary_picture_is_a_png(tmp_path: Path, write_run: WriteRun) -> None:
    run = write_run(tmp_path / "run", 12)
    summary_picture(run, tmp_path / "summary.png")
    with Image.open(tmp_path / "summary.png") as image:
        assert image.format == "PNG"
        assert image.width > 1200
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 100


def test_the_summary_picture_says_what_it_lacks(tmp_path: Path, write_run: WriteRun) -> None:
    run = write_run(tmp_path / "run", 4)
    (run / "evaluations" / "cold_start_heldout.json").unlink()
    (run / "evaluations" / "cold_start_ood.json").unlink()
    with pytest.raises(ValueError, match="evaluated both as cold_start and grpo"):
        summary_picture(run, tmp_path / "summary.png")
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="holds no step"):
        summary_picture(run, tmp_path / "summary.png")
