"""Two thousand clips, half of them broken, leave nothing behind: no memory, no open file, no thread."""

import ctypes
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from dali_at_hand import require_dali
from decode_many import DECODERS, MEASURES

LIMIT_SECONDS = 500.0
"""For a process that takes about 20 s on two free cores."""
NUM_CLIPS = {"pyav": 2000, "both": 400}
"""DALI takes a tenth of a second for each of its own, however short: 200 s for 2,000."""
MOST_GROWTH = {
    "heap_bytes": 256 << 10,  # Measured 0.1 KiB: a quarter of a KiB kept of every clip is seen.
    "resident_bytes": 5 << 20,  # Measured 0.5 MiB at most: 20 KB kept of every clip come to 19 MiB.
    "python_blocks": 200,  # Measured 2: an object kept of every fifth clip is seen.
    "open_files": 0,
    "threads": 0,
}
"""From the second quarter to the last one, of 2,000 clips a thousand later; medians of each."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(ctypes.CDLL(None), "mallinfo2"),
        reason="measures glibc's heap, from 2.33 on, and reads /proc",
    ),
]


def _decode_many(directory: Path, count: int, *options: str) -> dict[str, Sequence[int]]:
    """Measures after every batch, in a process of its own."""
    command = [sys.executable, Path(__file__).with_name("decode_many.py"), directory, str(count), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    twentieth = count // 20
    assert report.pop("statuses") == {
        "ok": 10 * twentieth, "truncated": 4 * twentieth, "corrupt": 2 * twentieth, "unreadable": 2 * twentieth,
        "unsupported_codec": twentieth, "missing": twentieth,
    }  # fmt: skip
    assert tuple(report) == MEASURES
    return report


def _growth(history: Mapping[str, Sequence[int]]) -> dict[str, float]:
    quarter = len(history["threads"]) // 4
    return {
        name: statistics.median(values[-quarter:]) - statistics.median(values[quarter : 2 * quarter])
        for name, values in history.items()
    }


@pytest.mark.parametrize("decoder", DECODERS)
def test_many_clips_leave_nothing_behind(tmp_path: Path, decoder: str):
    if decoder == "both":
        require_dali()
    history = _decode_many(tmp_path, NUM_CLIPS[decoder], "--decoder", decoder)
    growth = _growth(history)
    print(growth)
    assert {name: grown for name, grown in growth.items() if grown > MOST_GROWTH[name]} == {}
    for name in ("open_files", "threads"):
        loaded = history[name][len(history[name]) // 2 :]  # DALI opens a file when it is first used.
        assert len(set(loaded)) == 1, history[name]


def test_each_measure_sees_its_leak(tmp_path: Path):
    """Of a fifth of the clips; what each clip leaves behind is told in ``decode_many.Leak``."""
    growth = _growth(_decode_many(tmp_path, 400, "--leak"))
    print(growth)
    assert [name for name, grown in growth.items() if grown <= MOST_GROWTH[name]] == []
