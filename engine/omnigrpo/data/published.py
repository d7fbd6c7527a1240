"""The published datasets by name."""

from pathlib import Path

from omnigrpo.data import dfew, mafw, ravdess
from omnigrpo.data.dataset_files import DatasetError
from omnigrpo.data.emer import read_emer
from omnigrpo.data.labelled import LabelledSplits

NAMES = ("dfew", "mafw", "ravdess", "emer")
LABEL_SETS = {"dfew": dfew.LABELS, "mafw": mafw.LABELS, "ravdess": ravdess.LABELS}


def read_published(
    name: str, root: Path, *, fold: int = 1, clips: Path | None = None, labels: Path | None = None
) -> LabelledSplits:
    """Read one of ``NAMES``; DatasetError for another name, or as its reader raises."""
    match name:
        case "dfew":
            return dfew.read_dfew(root, fold=fold, clips=clips)
        case "mafw":
            return mafw.read_mafw(root, fold=fold, clips=clips)
        case "ravdess":
            return ravdess.read_ravdess(clips or root)
        case "emer":
            return read_emer(root, labels=labels, clips=clips)
    raise DatasetError(f"unknown dataset {name!r}: known are {', '.join(NAMES)}")


def label_set(text: str) -> tuple[str, ...]:
    """The label set of a dataset, or the words of a list with commas; DatasetError for neither."""
    if text in LABEL_SETS:
        return LABEL_SETS[text]
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    if len(words) < 2:
        raise DatasetError(
            f"labels must be one of {', '.join(LABEL_SETS)}, or words with commas, got {text!r}"
        )
    return words
