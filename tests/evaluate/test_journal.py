"""What an interrupted evaluation keeps."""

from pathlib import Path

from omnigrpo.evaluate.evaluation_report import EvaluatedClip
from omnigrpo.evaluate.journal import EvaluationJournal, fingerprint_of


def clip(name: str) -> EvaluatedClip:
    return EvaluatedClip(
        prompt_id=name,
        clip=f"{name}.mp4",
        solution="happy",
        text="<answer>é</answer>",
        num_tokens=3,
        finish_reason="stop",
    )


def test_a_second_run_finds_what_the_first_answered(tmp_path: Path) -> None:
    path = tmp_path / "eval" / "a.partial.jsonl"
    journal = EvaluationJournal(path, "one")
    assert journal.done == ()
    journal.add([clip("a"), clip("b")])
    journal.add([clip("c")])
    again = EvaluationJournal(path, "one")
    assert again.done == (clip("a"), clip("b"), clip("c"))
    again.add([clip("d")])
    assert len(EvaluationJournal(path, "one").done) == 4


def test_answers_of_something_else_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    EvaluationJournal(path, "one").add([clip("a")])
    assert EvaluationJournal(path, "two").done == ()
    assert EvaluationJournal(path, "one").done == ()


def test_a_cut_off_line_is_answered_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    EvaluationJournal(path, "one").add([clip("a"), clip("b")])
    path.write_text(path.read_text()[:-10])
    journal = EvaluationJournal(path, "one")
    assert journal.done == (clip("a"),)
    journal.add([clip("b")])
    assert EvaluationJournal(path, "one").done == (clip("a"), clip("b"))


def test_it_goes_when_the_report_is_there(tmp_path: Path) -> None:
    journal = EvaluationJournal(tmp_path / "a.jsonl", "one")
    journal.remove()
    journal.remove()
    assert not (tmp_path / "a.jsonl").exists()


def test_the_fingerprint_follows_settings_and_files(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"1")
    one = fingerprint_of(["a", "bc"], [file])
    assert one == fingerprint_of(["a", "bc"], [file])
    assert one != fingerprint_of(["ab", "c"], [file])
    file.write_bytes(b"2")
    assert one != fingerprint_of(["a", "bc"], [file])
