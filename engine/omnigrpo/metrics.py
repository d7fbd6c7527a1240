"""What a run tells as it goes: JSON lines in its directory, TensorBoard if asked, a progress line.

Every file holds one JSON object per line. A line is flushed as a whole, so a kill tears at most the last one;
readers leave a torn last line out, and opening the log for writing removes it.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from enum import StrEnum
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
DROPPED_FILE = "dropped.jsonl"
EVALUATIONS_DIRECTORY = "evaluations"
"""Directory of the run that holds its evaluation reports, one JSON file each."""

REWARD_COMPONENT_PREFIX = "rewards/"
"""``rewards/<name>`` is the mean of one reward, unweighted."""
LOGPROB_DIFFERENCE_PREFIX = "logprob_difference/"
"""How the trainer's log-probs differ from the rollout's; the fields of ``algorithm.agreement.Agreement``."""
SECONDS_PREFIX = "seconds/"
"""``seconds/<phase>`` is the wall time of one phase; ``seconds/overlapped/<phase>`` ran beside the step."""


class Metric(StrEnum):
    """Names of the scalars that the progress line and the report know; any other may be logged too."""

    LOSS = "loss"
    REWARD = "reward/mean"
    REWARD_STD = "reward/std"
    EQUAL_GROUPS = "reward/equal_groups"
    KL = "kl/mean"
    ENTROPY = "entropy/mean"
    LENGTH = "completion/length"
    TRUNCATED = "completion/truncated"
    LOGPROB_DIFFERENCE = "logprob_difference/mean"
    LOGPROB_DIFFERENCE_P99 = "logprob_difference/p99"
    LOGPROB_DIFFERENCE_MAX = "logprob_difference/max"
    LOGPROB_DIFFERENCE_KL = "logprob_difference/kl"
    """k3 estimate of KL(rollout || trainer)."""
    LOGPROB_DIFFERENCE_BEYOND = "logprob_difference/share_beyond"
    """Share of tokens whose absolute difference exceeds ``agreement.bound``."""
    STALENESS = "rollout/staleness"
    """Updates between the weights that drew a token and those that learn from it, mean over tokens."""
    CARRIED = "rollout/carried"
    """Groups that go on in the next step."""
    GRAD_NORM = "grad_norm"
    LEARNING_RATE = "learning_rate"
    SAMPLES = "samples"
    SAMPLES_PER_SECOND = "samples_per_second"
    DROPPED = "prompts/dropped"
    STEP_SECONDS = "seconds/step"
    PREFETCH_DEPTH = "prefetch/depth"
    """Batches that were decoded and encoded when the step asked for its own, that one included; at most
    ``media.prefetch_depth``."""
    PREFETCH_STALLS = "prefetch/stalls"
    """1 when the step had to wait for its batch, else 0; without prefetch always 1."""
    PREFETCH_STALL_SECONDS = "prefetch/stall_seconds"
    """How long it waited."""
    CACHE_MEMORY_HITS = "cache/memory_hits"
    """Clips of the step whose features were in memory."""
    CACHE_DISK_HITS = "cache/disk_hits"
    """Clips of the step whose features were read from ``media.cache_directory``."""
    CACHE_MISSES = "cache/misses"
    """Clips of the step that no tier had."""
    MEDIA_DECODED = "media/decoded"
    """Clips decoded for the step, unusable ones included; 0 over cached clips."""


_SHOWN: tuple[tuple[Metric, str], ...] = (
    (Metric.REWARD, "reward {:.3f}"),
    (Metric.LOSS, "loss {:.4f}"),
    (Metric.KL, "KL {:.4f}"),
    (Metric.LENGTH, "length {:.1f}"),
    (Metric.SAMPLES_PER_SECOND, "{:.2f} samples/s"),
    (Metric.DROPPED, "{:.0f} dropped"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutRecord:
    """One sampled group, as text."""

    prompt_id: str
    clip: str
    """Path of the media file."""
    start_seconds: float | None
    end_seconds: float | None
    question: str
    solution: str
    texts: tuple[str, ...]
    """The completions."""
    totals: tuple[float, ...]
    """Weighted reward of each completion."""
    components: dict[str, tuple[float, ...]]
    """Unweighted rewards by name, one per completion each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DroppedRecord:
    """A prompt that left its step, and why."""

    prompt_id: str
    status: str
    error: str


class MetricsLog:
    """Appends to the files of one run directory; also a context manager that closes them.

    Steps must increase. A resumed run calls ``truncate_after`` with the step of its checkpoint first, so that
    no step is listed twice.
    """

    def __init__(self, directory: Path, *, tensorboard: bool = False) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._files: dict[str, TextIOWrapper] = {}
        self._with_tensorboard = tensorboard
        for name in (METRICS_FILE, ROLLOUTS_FILE, DROPPED_FILE):
            _remove_torn_line(directory / name)
        written = read_jsonl(directory / METRICS_FILE)
        self._last_step: int | None = written[-1]["step"] if written else None
        self._tensorboard = _tensorboard_writer(directory, purge_step=None) if tensorboard else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the scalars of one step; a value that is not finite becomes null and is listed by name."""
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(
                f"{self._directory / METRICS_FILE} already holds step {self._last_step}, got step {step}; "
                "call truncate_after(step) when resuming, or write to a new directory"
            )
        values = {name: float(value) for name, value in metrics.items()}
        non_finite = [name for name, value in values.items() if not math.isfinite(value)]
        record: dict[str, object] = {"step": step}
        record |= {name: None if name in non_finite else value for name, value in values.items()}
        if non_finite:
            record["non_finite"] = non_finite
        self._append(METRICS_FILE, [record])
        self._last_step = step
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def log_rollouts(self, step: int, records: Iterable[RolloutRecord]) -> None:
        """Write a few sampled groups of one step."""
        self._append(ROLLOUTS_FILE, [{"step": step} | asdict(record) for record in records])

    def log_dropped(self, step: int, records: Iterable[DroppedRecord]) -> None:
        """Write the prompts that one step went on without."""
        self._append(DROPPED_FILE, [{"step": step} | asdict(record) for record in records])

    def truncate_after(self, step: int) -> None:
        """Drop every line of a later step; each file is replaced atomically."""
        self.close()
        for name in (METRICS_FILE, ROLLOUTS_FILE, DROPPED_FILE):
            path = self._directory / name
            if path.exists():
                _replace_lines(path, [record for record in read_jsonl(path) if record["step"] <= step])
        written = read_jsonl(self._directory / METRICS_FILE)
        self._last_step = written[-1]["step"] if written else None
        if self._with_tensorboard:
            self._tensorboard = _tensorboard_writer(self._directory, purge_step=step + 1)

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, name: str, records: Sequence[Mapping[str, object]]) -> None:
        if not records:
            return
        if name not in self._files:
            self._files[name] = (self._directory / name).open("a", encoding="utf-8")
        self._files[name].write("".join(_line(record) for record in records))
        self._files[name].flush()


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl (or of the run directory that holds it), without a torn last line."""
    return read_jsonl(path / METRICS_FILE if path.is_dir() else path)


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a file of JSON lines; empty when there is no file.

    A last line that a kill cut short is left out; any other line that is not a JSON object is a ValueError.
    """
    if not path.exists():
        return []
    *lines, _torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [_parse(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]


def _parse(line: str, path: Path, number: int) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number} is not JSON ({error}); remove the line") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}:{number} holds {line[:40]!r}, not a JSON object; remove the line")
    return record


def _line(record: Mapping[str, object]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _remove_torn_line(path: Path) -> None:
    """Cut the file after its last complete line."""
    if not path.exists():
        return
    content = path.read_bytes()
    complete = content.rfind(b"\n") + 1
    if complete < len(content):
        with path.open("r+b") as file:
            file.truncate(complete)


def _replace_lines(path: Path, records: Sequence[Mapping[str, object]]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(_line(record) for record in records)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _tensorboard_writer(directory: Path, *, purge_step: int | None) -> "SummaryWriter":
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"tensorboard is on, but its writer cannot be imported ({error}); "
            "run `pip install tensorboard` or turn it off"
        ) from error
    return SummaryWriter(str(directory / "tensorboard"), purge_step=purge_step)


def describe(metrics: Mapping[str, float]) -> str:
    """The figures worth watching among ``metrics``, e.g. ``reward 1.250  KL 0.0031  length 42.0``.

    The loss is shown only without a reward (supervised training): under GRPO it says nothing. Dropped prompts
    are shown only when there are any.
    """
    hidden = {Metric.LOSS} if Metric.REWARD in metrics else set()
    if not metrics.get(Metric.DROPPED):
        hidden.add(Metric.DROPPED)
    return "  ".join(
        text.format(metrics[name]) for name, text in _SHOWN if name in metrics and name not in hidden
    )


class TrainingProgress:
    """Shows one step after the other; built by ``training_progress``."""

    def __init__(
        self,
        show: Callable[[int, str], None],
        *,
        total_steps: int,
        first_step: int,
        clock: Callable[[], float],
    ) -> None:
        self._show = show
        self._total_steps = total_steps
        self._first_step = first_step
        self._clock = clock
        self._started = clock()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report that ``step`` (counted from 1) is done."""
        self._show(step, "  ".join(part for part in (describe(metrics), self._eta(step)) if part))

    def _eta(self, step: int) -> str:
        done = step - self._first_step
        if done <= 0:
            return ""
        seconds_per_step = (self._clock() - self._started) / done
        remaining = round(seconds_per_step * max(self._total_steps - step, 0))
        return f"ETA {timedelta(seconds=remaining)}"


@contextmanager
def training_progress(
    total_steps: int,
    *,
    first_step: int = 0,
    title: str = "train",
    lines_every: int = 10,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[TrainingProgress]:
    """A bar in a terminal; elsewhere one plain line for the first, the last and each ``lines_every``-th step.

    ``first_step`` is the number of steps that an earlier run has done already.
    """
    console = console or Console()
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total_steps, completed=first_step, figures="")

            def show_bar(step: int, figures: str) -> None:
                bar.update(task, completed=step, figures=figures)

            yield TrainingProgress(show_bar, total_steps=total_steps, first_step=first_step, clock=clock)
        return

    def show_line(step: int, figures: str) -> None:
        if step % lines_every == 0 or step in (first_step + 1, total_steps):
            console.print(f"{title} {step}/{total_steps}  {figures}", soft_wrap=True, highlight=False)

    yield TrainingProgress(show_line, total_steps=total_steps, first_step=first_step, clock=clock)
