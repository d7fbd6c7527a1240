"""MAFW (Liu et al., 2022): 11 emotions of film and television clips, five folds.

Fold k is read from ``Train & Test Set/single/no_caption/set_k/train.txt`` and ``test.txt`` (or the same below ``anno``
or ``label``), whose lines are a clip's file name, blanks, and the label's noun. Clips lie in ``data/clips``, ``clips``
or anywhere below the dataset's directory.
"""

from collections.abc import Iterator
from pathlib import Path

from omnigrpo.data.dataset_files import DatasetError
from omnigrpo.data.labelled import ClipIndex, LabelledClip, LabelledSplits, found_clips

NOUNS = {
    "anger": "angry",
    "disgust": "disgust",
    "fear": "fear",
    "happiness": "happy",
    "neutral": "neutral",
    "sadness": "sad",
    "surprise": "surprise",
    "contempt": "contemptuous",
    "anxiety": "anxious",
    "helplessness": "helpless",
    "disappointment": "disappointed",
}
"""The dataset's name of every label, and R1-Omni's."""
LABELS = tuple(NOUNS.values())
FOLDS = range(1, 6)
_ANNOTATIONS = ("Train & Test Set/single/no_caption", "anno/single/no_caption", "label/no_caption")
_CLIPS = ("data/clips", "clips", ".")


def read_mafw(root: Path, *, fold: int = 1, clips: Path | None = None) -> LabelledSplits:
    """Read one fold; ``clips`` is the directory of the clips where it is none of the usual ones.

    Raises:
        DatasetError: a file that is missing, or a line or label of another form (named with file and line).
    """
    if fold not in FOLDS:
        raise DatasetError(f"MAFW has the folds 1 to 5, got {fold}")
    directory = clips or next(root / name for name in _CLIPS if (root / name).is_dir() or name == ".")
    index = ClipIndex(directory)
    splits: dict[str, tuple[LabelledClip, ...]] = {}
    skipped: list[str] = []
    for split in ("train", "test"):
        splits[split], missing = found_clips(index, _annotated(_annotations(root, split, fold)))
        skipped += missing
    return LabelledSplits(splits=splits, labels=LABELS, skipped=tuple(skipped))


def _annotations(root: Path, split: str, fold: int) -> Path:
    paths = [root / directory / f"set_{fold}" / f"{split}.txt" for directory in _ANNOTATIONS]
    return next((path for path in paths if path.is_file()), paths[0])


def _annotated(path: Path) -> Iterator[tuple[str, str, None]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DatasetError(f"{path} does not exist: check the dataset's directory and the fold") from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is no text in UTF-8: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, *nouns = line.strip().rsplit(maxsplit=1)
        if not nouns:
            raise DatasetError(f"{path}, line {number}: expected a file name and a label, got {line!r}")
        noun = nouns[0]
        if noun.lower() not in NOUNS:
            raise DatasetError(
                f"{path}, line {number}: label must be one of {', '.join(NOUNS)}, got {noun!r}"
            )
        yield name, NOUNS[noun.lower()], None
