"""A thousand randomly damaged files: each ends in a status, and harms neither its process nor its batch."""

import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from broken_files import ANY
from dali_at_hand import require_dali
from decode_mutations import CHANGES, DECODERS, mutation

COUNT = 1000
PROCESSES = 2
LIMIT_SECONDS = 500.0
"""For one process; they take about a minute on two free cores."""


def _check(directory: Path, first: int, count: int, *options: str) -> Counter[str]:
    """Decode mutations in a process of its own; returns the statuses, or fails with the file that was decoded last."""
    directory.mkdir()
    command = [
        sys.executable,
        Path(__file__).with_name("decode_mutations.py"),
        directory,
        str(first),
        str(count),
    ]
    with (directory / "out").open("w+") as out, (directory / "err").open("w+") as err:
        try:
            status = subprocess.run(
                [*command, *options], stdout=out, stderr=err, check=False, timeout=LIMIT_SECONDS
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
        out.seek(0)
        err.seek(0)
        lines = out.read().splitlines() or ["none: it did not get to any"]
        if status != 0:
            how = "took too long" if status is None else f"ended with {status}"
            pytest.fail(f"the process {how} at the file {lines[-1]!r}\n{err.read()[-4000:]}", pytrace=False)
    statuses = Counter(json.loads(lines[-1]))
    assert len(lines) == 1 + count
    assert statuses.total() == count
    return statuses


@pytest.mark.slow
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_thousand_mutations_end_in_a_status_and_harm_no_other_clip(tmp_path: Path, decoder: str):
    if decoder == "both":
        require_dali()
    share = COUNT // PROCESSES
    with ThreadPoolExecutor(PROCESSES) as pool:
        parts = pool.map(
            lambda part: _check(tmp_path / str(part), part * share, share, "--decoder", decoder),
            range(PROCESSES),
        )
        statuses = sum(parts, Counter())
    print(dict(statuses))
    assert statuses.keys() <= ANY
    assert statuses["ok"] <= COUNT / 2, "most changes must do damage"
    assert statuses.keys() >= {"ok", "truncated", "corrupt", "unreadable", "no_video"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decoder", "words"),
    [("crash", "ended with -6"), ("hang", "Timeout"), ("harm", "a good clip of its batch is harmed")],
)
def test_a_crash_a_hang_and_harm_are_noticed_and_name_the_file(tmp_path: Path, decoder: str, words: str):
    with pytest.raises(pytest.fail.Exception) as failure:
        _check(tmp_path / "files", 1, 2, "--decoder", decoder, "--hang-seconds", "2")
    assert words in str(failure.value)
    assert repr(mutation(1)[0]) in str(failure.value)


def test_mutations_are_as_many_kinds_as_promised_and_the_same_each_time():
    names = {mutation(number)[0].split(maxsplit=1)[1] for number in range(150)}
    assert len(names) == 150
    assert {name.split()[0] for name in names} == {change.__name__ for change in CHANGES}
    assert mutation(7) == mutation(7)
    assert len({content for _, content in map(mutation, range(150))}) >= 148
