"""RAVDESS (Livingstone and Russo, 2018): 24 actors, 8 emotions, labels in the file names.

A name is seven numbers: modality (01 picture and sound, 02 picture, 03 sound), channel (01 speech, 02 song), emotion,
intensity, statement, repetition, actor. R1-Omni uses it for testing only, and calls 06 fear and 08 surprise.
"""

import re
from pathlib import Path

from omnigrpo.data.dataset_files import DatasetError
from omnigrpo.data.labelled import VIDEO_SUFFIXES, LabelledClip, LabelledSplits

LABELS = ("neutral", "calm", "happy", "sad", "angry", "fear", "disgust", "surprise")
"""By number, from 1."""
_NAME = re.compile(r"\d\d(-\d\d){6}")
_FULL, _SPEECH = "01", "01"


def read_ravdess(root: Path, *, speech_only: bool = True) -> LabelledSplits:
    """Every clip with picture and sound below ``root``, as the split ``test``; songs only if asked for.

    Raises:
        DatasetError: no such clip, a video whose name is no RAVDESS name, or an emotion that is none of the eight.
    """
    if not root.is_dir():
        raise DatasetError(f"{root} is no directory: name RAVDESS's, with Actor_01 ... Actor_24 below it")
    clips: list[LabelledClip] = []
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() not in VIDEO_SUFFIXES:
            continue
        modality, channel, emotion = _parts(path)
        if modality == _FULL and (channel == _SPEECH or not speech_only):
            clips.append(LabelledClip(path=path, label=_label(emotion, path)))
    if not clips:
        raise DatasetError(f"{root} holds no clip with picture and sound (names that begin with 01-01-)")
    return LabelledSplits(splits={"test": tuple(clips)}, labels=LABELS)


def _parts(path: Path) -> tuple[str, str, str]:
    if not _NAME.fullmatch(path.stem):
        raise DatasetError(
            f"{path}: a RAVDESS name is seven numbers of two digits, e.g. 01-01-06-01-02-01-12.mp4"
        )
    modality, channel, emotion, *_ = path.stem.split("-")
    return modality, channel, emotion


def _label(emotion: str, path: Path) -> str:
    if not 1 <= int(emotion) <= len(LABELS):
        raise DatasetError(
            f"{path}: the emotion (third number) must be 01 to {len(LABELS):02d}, got {emotion}"
        )
    return LABELS[int(emotion) - 1]
