"""Checkpoints: what is kept, what is detected, and what survives a kill."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from omnigrpo.runtime.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    latest_checkpoint,
    load_state,
    model_directory,
    step_of,
    verify_checkpoint,
)


def write_model(directory: Path) -> None:
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "vocab.json").write_text("{}", encoding="utf-8")
    (directory / "model.safetensors").write_bytes(bytes(range(200)))


def save(directory: Path, *steps: int, keep_last: int = 3) -> CheckpointWriter:
    writer = CheckpointWriter(directory, keep_last=keep_last)
    for step in steps:
        writer.save(step, write_model, {"step": step, "moment": torch.tensor([float(step)])})
    return writer


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_round_trip(tmp_path: Path):
    save(tmp_path / "new" / "checkpoints", 123)
    checkpoint = latest_checkpoint(tmp_path / "new" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint == tmp_path / "new" / "checkpoints" / "step-000123"
    assert step_of(checkpoint) == 123
    assert load_state(checkpoint) == {"step": 123, "moment": torch.tensor([123.0])}
    assert (model_directory(checkpoint) / "model.safetensors").read_bytes() == bytes(range(200))
    assert (model_directory(checkpoint) / "tokenizer" / "vocab.json").read_text(encoding="utf-8") == "{}"


def test_the_last_ones_are_kept(tmp_path: Path):
    save(tmp_path, 5, 10, 15, 20, keep_last=2)
    assert names(tmp_path) == ["latest", "step-000015", "step-000020"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000020"


def test_a_run_resumed_from_the_past_owns_latest_and_replaces_what_it_reaches(tmp_path: Path):
    save(tmp_path, 3, 6, 9)
    writer = CheckpointWriter(tmp_path, keep_last=3)
    writer.save(6, write_model, {"timeline": 2})
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000006"
    assert load_state(tmp_path / "step-000006") == {"timeline": 2}
    assert names(tmp_path) == ["latest", "step-000003", "step-000006", "step-000009"]
    writer.save(9, write_model, {"timeline": 2})
    assert load_state(tmp_path / "step-000009") == {"timeline": 2}


def test_no_checkpoint_is_none(tmp_path: Path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None


def test_a_save_that_raises_leaves_no_trace(tmp_path: Path):
    writer = save(tmp_path, 1)

    def fail(directory: Path) -> None:
        write_model(directory)
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        writer.save(2, fail, {})
    assert names(tmp_path) == ["latest", "step-000001"]


def _remove_weights(checkpoint: Path) -> None:
    (checkpoint / "model" / "model.safetensors").unlink()


def _cut_weights(checkpoint: Path) -> None:
    os.truncate(checkpoint / "model" / "model.safetensors", 100)


def _flip_bit(checkpoint: Path) -> None:
    path = checkpoint / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def _remove_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def _cut_manifest(checkpoint: Path) -> None:
    os.truncate(checkpoint / "manifest.json", 40)


def _empty_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text(json.dumps({"step": 3}), encoding="utf-8")


DAMAGES = {
    _remove_weights: "model/model.safetensors is missing",
    _cut_weights: "model/model.safetensors has 100 bytes, expected 200",
    _flip_bit: "the content of state.safetensors has changed",
    _remove_manifest: "it has no manifest.json",
    _cut_manifest: "manifest.json: ",
    _empty_manifest: "manifest.json lists no files",
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.items(), ids=[d.__name__ for d in DAMAGES])
def test_damage_is_told_and_the_one_before_is_taken(damage, message: str, tmp_path: Path):
    save(tmp_path, 1, 2, 3)
    damage(tmp_path / "step-000003")
    with pytest.raises(CheckpointError, match=re.escape(message)):
        verify_checkpoint(tmp_path / "step-000003")
    with pytest.warns(UserWarning, match=f"step-000003 is damaged: .*{re.escape(message)}"):
        assert latest_checkpoint(tmp_path) == tmp_path / "step-000002"


def test_load_state_refuses_damaged_state(tmp_path: Path):
    save(tmp_path, 1)
    _flip_bit(tmp_path / "step-000001")
    with pytest.raises(CheckpointError, match=r"state\.safetensors has changed"):
        load_state(tmp_path / "step-000001")


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path: Path):
    save(tmp_path, 1, 2)
    _flip_bit(tmp_path / "step-000001")
    _cut_weights(tmp_path / "step-000002")
    warned = pytest.warns(UserWarning, match="is damaged")
    with warned, pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("pointer", [None, "", "step-000009\n", "nonsense"])
def test_a_wrong_pointer_is_not_needed(pointer: str | None, tmp_path: Path):
    save(tmp_path, 1, 2)
    if pointer is None:
        (tmp_path / "latest").unlink()
    else:
        (tmp_path / "latest").write_text(pointer, encoding="utf-8")
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000002"


def test_what_a_killed_writer_left_is_cleared_at_the_next_start(tmp_path: Path):
    save(tmp_path, 1)
    (tmp_path / "step-000002.tmp-77" / "model").mkdir(parents=True)
    (tmp_path / "latest.tmp-77").write_text("step-000002", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000001"
    CheckpointWriter(tmp_path, keep_last=1)
    assert names(tmp_path) == ["latest", "notes.txt", "step-000001"]


def test_wrong_arguments(tmp_path: Path):
    with pytest.raises(ValueError, match="keep_last must be >= 1, got 0"):
        CheckpointWriter(tmp_path, keep_last=0)
    with pytest.raises(CheckpointError, match="must be like step-000123"):
        step_of(tmp_path)


@pytest.mark.parametrize("mode", ["calls", "times"])
def test_a_kill_at_any_moment_leaves_the_last_good_one(mode: str, tmp_path: Path):
    """SIGKILL before and after each call that changes the disk, and at 60 random moments."""
    script = Path(__file__).with_name("kill_saves.py")
    result = subprocess.run(
        [sys.executable, str(script), mode, str(tmp_path / "checkpoints")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.match(r"survived \d{2,} kills", result.stdout), result.stdout
    print(result.stdout)
