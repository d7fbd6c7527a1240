"""Checkpoints that a kill at any moment cannot spoil.

    directory/
      latest                 the name of the newest checkpoint, replaced atomically
      step-000123/
        manifest.json        size and SHA-256 of every other file
        model/               what ``write_model`` wrote
        state.json           the state's structure and numbers
        state.safetensors    the state's tensors

A checkpoint is written under a temporary name, synced to the disk, and renamed: under its own name it is
complete. One writer per directory; any number of readers.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from omnigrpo.runtime.state_tree import State, read_state, write_state

_STEP_NAME = re.compile(r"step-(\d{6,})")
_REPLACED_NAME = re.compile(r"(step-\d{6,})\.replaced")
_TEMPORARY_NAME = re.compile(r"(step-\d{6,}|latest)\.tmp-.*")
_MANIFEST = "manifest.json"
_LATEST = "latest"


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded: which, why, and what to do."""


class CheckpointWriter:
    """Saves checkpoints into one directory and prunes the old ones."""

    def __init__(self, directory: Path, keep_last: int) -> None:
        """Create the directory, and clear away what a killed writer left in it."""
        if keep_last < 1:
            raise ValueError(f"keep_last must be >= 1, got {keep_last}")
        self._directory = directory
        self._keep_last = keep_last
        directory.mkdir(parents=True, exist_ok=True)
        _restore_replaced(directory)
        for path in directory.iterdir():
            if _TEMPORARY_NAME.fullmatch(path.name) or _REPLACED_NAME.fullmatch(path.name):
                _remove(path)

    def save(self, step: int, write_model: Callable[[Path], None], state: State) -> Path:
        """Save the model, written by ``write_model`` into the directory it is given, and the state.

        An earlier checkpoint of the same step is replaced. When this returns, the checkpoint is on the disk;
        when it raises, or never returns, there is still the one before.
        """
        final = self._directory / f"step-{step:06d}"
        temporary = self._directory / f"{final.name}.tmp-{os.getpid()}"
        try:
            (temporary / "model").mkdir(parents=True)
            write_model(temporary / "model")
            write_state(state, temporary)
            _write_manifest(temporary, step)
            _sync_tree(temporary)
            self._publish(temporary, final)
        finally:
            if temporary.exists():
                shutil.rmtree(temporary)
        self._prune(step)
        return final

    def _publish(self, temporary: Path, final: Path) -> None:
        replaced = final.with_name(f"{final.name}.replaced")
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
        _sync(self._directory)
        pointer = self._directory / f"{_LATEST}.tmp-{os.getpid()}"
        pointer.write_text(final.name + "\n", encoding="utf-8")
        _sync(pointer)
        pointer.replace(self._directory / _LATEST)
        _sync(self._directory)
        if replaced.exists():
            _remove(replaced)

    def _prune(self, step: int) -> None:
        """Later steps stay: they belong to a run that was resumed from before them."""
        past = [path for path in _checkpoints(self._directory) if step_of(path) <= step]
        for path in past[self._keep_last :]:
            _remove(path)


def latest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint to resume from, or None where there is none.

    It is the one that ``latest`` names, verified file by file; if that is damaged, a warning says how, and
    the newest intact one before it (else after it) is taken. Raises ``CheckpointError`` when all are damaged.
    """
    if not directory.is_dir():
        return None
    _restore_replaced(directory)
    candidates = _checkpoints(directory)
    pointed = _pointed_step(directory)
    if pointed is not None:
        candidates.sort(key=lambda path: (step_of(path) <= pointed, step_of(path)), reverse=True)
    for path in candidates:
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            warnings.warn(f"{error}; trying an earlier one", stacklevel=2)
        else:
            return path
    if candidates:
        raise CheckpointError(
            f"none of the {len(candidates)} checkpoints in {directory} is intact; start without resuming"
        )
    return None


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name tells."""
    match = _STEP_NAME.fullmatch(checkpoint.name)
    if match is None:
        raise CheckpointError(f"{checkpoint} is not a checkpoint: its name must be like step-000123")
    return int(match[1])


def model_directory(checkpoint: Path) -> Path:
    """Where ``write_model`` wrote."""
    return checkpoint / "model"


def load_state(checkpoint: Path) -> State:
    """Read the state back with its structure, types and dtypes; tensors are on the CPU.

    Verifies the files it reads and raises ``CheckpointError`` for a damaged one.
    """
    for name, expected in _read_manifest(checkpoint).items():
        if name.startswith("state."):
            _verify_file(checkpoint, name, expected)
    return read_state(checkpoint)


def verify_checkpoint(checkpoint: Path) -> None:
    """Compare every file with the manifest; raise ``CheckpointError`` for the first that differs."""
    for name, expected in _read_manifest(checkpoint).items():
        _verify_file(checkpoint, name, expected)


def _checkpoints(directory: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in directory.iterdir() if _STEP_NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def _pointed_step(directory: Path) -> int | None:
    pointer = directory / _LATEST
    if not pointer.exists():
        return None
    match = _STEP_NAME.fullmatch(pointer.read_text(encoding="utf-8", errors="replace").strip())
    return None if match is None else int(match[1])


def _restore_replaced(directory: Path) -> None:
    """Undo a replacement that was killed between its two renames."""
    for path in list(directory.iterdir()):
        match = _REPLACED_NAME.fullmatch(path.name)
        if match is not None and not path.with_name(match[1]).exists():
            path.rename(path.with_name(match[1]))


def _remove(path: Path) -> None:
    """Delete under a temporary name, so that what a kill leaves is never taken for a checkpoint."""
    if not path.is_dir():
        path.unlink()
        return
    doomed = path.with_name(f"{path.name.split('.')[0]}.tmp-removed-{os.getpid()}")
    if path != doomed:
        path.rename(doomed)
    shutil.rmtree(doomed)


def _files(checkpoint: Path) -> Iterator[Path]:
    return (path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != _MANIFEST)


def _write_manifest(checkpoint: Path, step: int) -> None:
    files = {
        path.relative_to(checkpoint).as_posix(): {"size": path.stat().st_size, "sha256": _digest(path)}
        for path in _files(checkpoint)
    }
    text = json.dumps({"step": step, "files": files}, indent=1)
    (checkpoint / _MANIFEST).write_text(text, encoding="utf-8")


def _read_manifest(checkpoint: Path) -> dict[str, dict[str, int | str]]:
    path = checkpoint / _MANIFEST
    if not path.is_file():
        raise CheckpointError(f"checkpoint {checkpoint} is damaged: it has no {_MANIFEST}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"checkpoint {checkpoint} is damaged: {_MANIFEST}: {error}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"checkpoint {checkpoint} is damaged: {_MANIFEST} lists no files")
    return manifest["files"]


def _verify_file(checkpoint: Path, name: str, expected: dict[str, int | str]) -> None:
    path = checkpoint / name
    if not path.is_file():
        raise CheckpointError(f"checkpoint {checkpoint} is damaged: {name} is missing")
    if (size := path.stat().st_size) != expected["size"]:
        raise CheckpointError(
            f"checkpoint {checkpoint} is damaged: {name} has {size} bytes, expected {expected['size']}"
        )
    if _digest(path) != expected["sha256"]:
        raise CheckpointError(f"checkpoint {checkpoint} is damaged: the content of {name} has changed")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_tree(root: Path) -> None:
    for path in root.rglob("*"):
        _sync(path)
    _sync(root)
    _sync(root.parent)


def _sync(path: Path) -> None:
    """Force a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
