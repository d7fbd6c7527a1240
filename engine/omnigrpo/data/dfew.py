"""DFEW (Jiang et al., 2020): 7 emotions of film clips, five folds.

Annotations of fold k are read from ``EmoLabel_DataSplit/train(single-labeled)/set_k.csv`` and ``test(...)`` with the
columns ``video_name`` and ``label``, or from ``label/single_trainset_k.csv`` and ``single_testset_k.csv``; labels are
numbers from 1. Clips are video files named by number, with or without leading zeros, anywhere below ``Clip/original``
(beside which the dataset has cropped ones), else ``Clip``, else the dataset's directory. R1-Omni's test set has the
size of fold 1's (2,341).
"""

from pathlib import Path

from omnigrpo.data.dataset_files import DatasetError
from omnigrpo.data.labelled import ClipIndex, LabelledClip, LabelledSplits, found_clips, read_table

LABELS = ("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear")
"""By number, from 1."""
FOLDS = range(1, 6)
_CLIPS = ("Clip/original", "Clip", ".")


def read_dfew(root: Path, *, fold: int = 1, clips: Path | None = None) -> LabelledSplits:
    """Read one fold; ``clips`` is the directory of the clips where it is none of the usual ones.

    Raises:
        DatasetError: a file that is missing, or a label that is no number from 1 to 7 (named with file and line).
    """
    if fold not in FOLDS:
        raise DatasetError(f"DFEW has the folds 1 to 5, got {fold}")
    index = ClipIndex(clips or next(root / name for name in _CLIPS if (root / name).is_dir() or name == "."))
    splits: dict[str, tuple[LabelledClip, ...]] = {}
    skipped: list[str] = []
    for split in ("train", "test"):
        path = _annotations(root, split, fold)
        rows = read_table(path, ("video_name", "label"))
        annotated = ((row["video_name"], _label(row["label"], path, line), None) for line, row in rows)
        splits[split], missing = found_clips(index, annotated)
        skipped += missing
    return LabelledSplits(splits=splits, labels=LABELS, skipped=tuple(skipped))


def _annotations(root: Path, split: str, fold: int) -> Path:
    first = root / "EmoLabel_DataSplit" / f"{split}(single-labeled)" / f"set_{fold}.csv"
    second = root / "label" / f"single_{split}set_{fold}.csv"
    return second if second.is_file() and not first.is_file() else first


def _label(text: str, path: Path, line: int) -> str:
    if not text.isdecimal() or not 1 <= int(text) <= len(LABELS):
        raise DatasetError(
            f"{path}, line {line}: label must be a number from 1 to {len(LABELS)}, got {text!r}"
        )
    return LABELS[int(text) - 1]
