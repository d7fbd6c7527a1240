"""Answers of an evaluation on disk while it runs, so that an interrupted one goes on."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from omnigrpo.evaluate.evaluation_report import EvaluatedClip

_CHUNK = 1 << 22


class EvaluationJournal:
    """JSON lines: the fingerprint of what is evaluated, then one evaluated clip each."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Open it; what it holds of another fingerprint is forgotten, and a last line that was cut off too."""
        self._path = path
        self.done: tuple[EvaluatedClip, ...] = _read(path, fingerprint)
        lines = [json.dumps({"fingerprint": fingerprint}), *map(_line, self.done)]
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.tmp")
        fresh.write_text("\n".join(lines) + "\n", encoding="utf-8")
        fresh.replace(path)

    def add(self, clips: Iterable[EvaluatedClip]) -> None:
        """Append clips; they are on disk when this returns."""
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(f"{_line(clip)}\n" for clip in clips)

    def remove(self) -> None:
        """Delete the file, once the report is written."""
        self._path.unlink(missing_ok=True)


def fingerprint_of(parts: Sequence[str], files: Iterable[Path]) -> str:
    """Hex digest of settings and of the content of files, whatever directory they lie in."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.name}:{os.fstat(file.fileno()).st_size}:".encode())
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def clip_stamp(path: Path) -> str:
    """Size in bytes and time of the last change of a clip, which tell cheaply that it is another one now."""
    try:
        status = path.stat()
    except OSError:
        return "not there"
    return f"{status.st_size}:{status.st_mtime_ns}"


def _line(clip: EvaluatedClip) -> str:
    return json.dumps(asdict(clip), ensure_ascii=False)


def _read(path: Path, fingerprint: str) -> tuple[EvaluatedClip, ...]:
    if not path.is_file():
        return ()
    whole_lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    if not whole_lines or whole_lines[0] != json.dumps({"fingerprint": fingerprint}):
        return ()
    return tuple(EvaluatedClip(**json.loads(line)) for line in whole_lines[1:])
