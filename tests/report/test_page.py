import json
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from omnigrpo.metrics import MetricsLog
from omnigrpo.report.header import header
from omnigrpo.report.inputs import load_run
from omnigrpo.report.page import write_report

WriteRun = Callable[..., Path]
SECTIONS = ("results", "curves", "confusion", "recalls", "time", "rollouts", "dropped")
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects the text, ids and addresses of a page, and checks that tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: Counter[str] = Counter()
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name.rpartition(":")[2] in ("src", "href", "srcset", "data", "poster", "action"):
                self.addresses.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def report(run: Path) -> tuple[Page, str]:
    html = write_report(run).read_text(encoding="utf-8")
    return Page(html), html


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def page(run_directory: Path, write_run: WriteRun) -> tuple[Page, str]:
    """The page of a whole run, rendered once."""
    path = run_directory / "report.html"
    if not path.exists():
        write_run(run_directory)
        write_report(run_directory)
    html = path.read_text(encoding="utf-8")
    return Page(html), html


def test_every_section_is_there_and_tags_are_balanced(page: tuple[Page, str]) -> None:
    parsed, html = page
    assert [name for name in parsed.ids if name in SECTIONS] == list(SECTIONS)
    assert "header" in parsed.ids
    assert parsed.open == []
    assert 'class="missing"' not in html
    assert 'class="problem"' not in html


def test_nothing_is_loaded_from_elsewhere(page: tuple[Page, str]) -> None:
    parsed, html = page
    assert parsed.addresses
    assert [a for a in parsed.addresses if not a.startswith(("data:image/jpeg;base64,", "#"))] == []
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    assert "@import" not in html
    assert re.findall(r"url\((?!#)", html) == []


def test_ids_are_unique_and_references_lead_somewhere(page: tuple[Page, str]) -> None:
    parsed, html = page
    assert [name for name, count in Counter(parsed.ids).items() if count > 1] == []
    wanted = {a[1:] for a in parsed.addresses if a.startswith("#")} | set(
        re.findall(r"url\(#([^)]+)\)", html)
    )
    assert wanted <= set(parsed.ids)


def test_charts_take_their_colours_from_variables_of_both_themes(page: tuple[Page, str]) -> None:
    _, html = page
    used = set(re.findall(r"var\(--(\w+)\)", html))
    light, dark = (set(re.findall(r"--(\w+):", block)) for block in re.findall(r":root {(.*?)}", html)[:2])
    assert used
    assert used <= light == dark
    assert "prefers-color-scheme: dark" in html
    assert "#00fe" not in html


def test_the_page_fits_a_phone(page: tuple[Page, str]) -> None:
    _, html = page
    assert 'name="viewport" content="width=device-width' in html
    assert all("width=" not in tag and "viewBox=" in tag for tag in re.findall(r"<svg[^>]*>", html))
    assert html.count("<table") == html.count('<div class="scroll"><table')


def test_the_figures_of_the_run_are_on_the_page(page: tuple[Page, str], run_directory: Path) -> None:
    parsed, _ = page
    evaluation = load_run(run_directory).evaluation("grpo", "heldout")
    assert evaluation is not None
    war = evaluation.alias
    assert f"{100 * war.war:.1f} ± {100 * war.war_standard_error:.1f}" in parsed.text
    assert "surprise / fear" in parsed.text
    assert "decode tokens" in parsed.text
    assert "decode, in the background" in parsed.text
    for title in ("Reward", "KL to the reference", "Entropy", "Completion length", "Throughput"):
        assert title in parsed.text
    # 9 curves, 2 folded ones (loss, reward/std), 4 confusion matrices, 2 recall charts, 1 of the phases.
    assert parsed.tags["svg"] == 9 + 2 + 4 + 2 + 1


def test_rollouts_show_frames_reasoning_answer_and_reward_as_text(page: tuple[Page, str]) -> None:
    parsed, html = page
    assert parsed.tags["article"] == 8
    assert parsed.tags["img"] == 8 * 4
    assert "raised <slightly> at step 1" in parsed.text
    assert "&lt;slightly&gt;" in html
    assert "Early in training" in parsed.text
    assert "Late in training" in parsed.text
    assert "reward 2 (accuracy 1, format 1)" in parsed.text
    assert "clips/broken.mp4: truncated <moov>" in parsed.text


def test_a_clip_that_cannot_be_read_shows_its_error(tmp_path: Path, write_run: WriteRun) -> None:
    run = write_run(tmp_path / "run", 4)
    (run / "clips" / "surprise.mp4").unlink()
    parsed, _ = report(run)
    assert "surprise.mp4 does not exist" in parsed.text
    assert 0 < parsed.tags["img"] < 8 * 4


def test_metrics_alone_make_a_page_that_says_what_is_missing(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.log(1, {"reward/mean": 0.5, "loss": float("nan")})
    parsed, _ = report(tmp_path)
    assert [name for name in parsed.ids if name in SECTIONS] == list(SECTIONS)
    assert "evaluations/ holds no report" in parsed.text
    assert "rollouts.jsonl holds no group" in parsed.text
    assert "No config.toml or config.json" in parsed.text
    assert "logged no seconds per phase" in parsed.text
    assert "Not logged by this run: accuracy of the rollouts, completion length" in parsed.text
    assert parsed.tags["svg"] == 1


def test_an_evaluation_alone_makes_a_page(tmp_path: Path, write_run: WriteRun) -> None:
    run = write_run(tmp_path / "run", 2)
    only = tmp_path / "only" / "evaluations"
    only.mkdir(parents=True)
    (only / "grpo_ood.json").write_bytes((run / "evaluations" / "grpo_ood.json").read_bytes())
    parsed, _ = report(only.parent)
    assert "metrics.jsonl holds no step" in parsed.text
    assert "Only GRPO was evaluated on this split" in parsed.text
    assert parsed.tags["svg"] == 2


def test_a_file_that_cannot_be_read_is_named_and_the_rest_is_drawn(
    tmp_path: Path, write_run: WriteRun
) -> None:
    run = write_run(tmp_path / "run", 2)
    (run / "evaluations" / "grpo_ood.json").write_text("{")
    (run / "evaluations" / "grpo_heldout.json").write_text(json.dumps({"stage": "grpo"}))
    (run / "config.toml").write_text("model = ")
    (run / "rollouts.jsonl").write_text("[]\n")
    parsed, _ = report(run)
    for name in (
        "grpo_ood.json cannot be read",
        "grpo_heldout.json: not an evaluation report",
        "config.toml cannot be read",
    ):
        assert name in parsed.text
    assert "rollouts.jsonl:1 holds '[]', not a JSON object" in parsed.text
    assert "Only cold start was evaluated on this split" in parsed.text


def copy_stage(run: Path, directory: Path, stages: dict[str, str], split: str = "heldout") -> Path:
    """A run directory with evaluations of ``run`` alone, each under another stage's name."""
    (directory / "evaluations").mkdir(parents=True, exist_ok=True)
    for old, new in stages.items():
        data = json.loads((run / "evaluations" / f"{old}_{split}.json").read_text()) | {"stage": new}
        (directory / "evaluations" / f"{new}_{split}.json").write_text(json.dumps(data))
    return directory


@pytest.mark.parametrize(
    ("stages", "order", "compared"),
    [
        (("grpo", "cold_start", "base"), ["base", "cold_start", "grpo"], ["cold_start", "grpo"]),
        (("cold_start", "base"), ["base", "cold_start"], ["base", "cold_start"]),
        (("grpo", "base"), ["base", "grpo"], ["base", "grpo"]),
        (("eval", "cold_start"), ["cold_start", "eval"], ["cold_start", "eval"]),
        (("later", "eval", "other"), ["eval", "later", "other"], ["eval", "other"]),
        (("eval",), ["eval"], ["eval"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
def test_two_stages_are_compared_whatever_they_are(
    tmp_path: Path, write_run: WriteRun, stages: tuple[str, ...], order: list[str], compared: list[str]
) -> None:
    whole = write_run(tmp_path / "whole", 1)
    directory = tmp_path / "run"
    for stage in stages:
        copy_stage(whole, directory, {"grpo": stage})
    run = load_run(directory)
    assert [evaluation.stage for evaluation in run.evaluations] == order
    assert [evaluation.stage for evaluation in run.compared("heldout")] == compared
    parsed, _ = report(directory)
    assert parsed.tags["svg"] == len(compared) + 1
    assert ("Only eval was evaluated on this split" in parsed.text) == (len(compared) == 1)


def test_every_stage_is_in_the_table_of_results(tmp_path: Path, write_run: WriteRun) -> None:
    run = write_run(tmp_path / "run", 1)
    copy_stage(run, run, {"cold_start": "base"})
    _, html = report(run)
    table = html[html.index('id="results"') : html.index('id="curves"')]
    stages = re.findall(r"<td[^>]*>((?:by )?(?:base|cold start|GRPO))</td>", table)
    held_out = ["base", "cold start", "GRPO", "by cold start", "by GRPO"]
    assert stages == [*held_out, "cold start", "GRPO", "by GRPO"]


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"reward/mean": 0.5, "loss": 0.1}, "7 steps of GRPO"),
        ({"loss": 0.1}, "7 steps of supervised training"),
    ],
)
def test_the_header_says_what_kind_of_training_it_was(
    tmp_path: Path, metrics: dict[str, float], words: str
) -> None:
    with MetricsLog(tmp_path) as log:
        log.log(7, metrics)
    assert f">{words}<" in header(load_run(tmp_path))


def test_a_rollout_line_without_its_fields_is_named(tmp_path: Path, write_run: WriteRun) -> None:
    run = write_run(tmp_path / "run", 2)
    (run / "rollouts.jsonl").write_text('{"step": 1, "prompt_id": "p"}\n')
    parsed, _ = report(run)
    assert "rollouts.jsonl: a line of step 1 lacks clip" in parsed.text


def test_a_config_in_json_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model": {"path": "a<b"}, "reward": {"terms": []}}))
    parsed, html = report(tmp_path)
    assert "a<b" in parsed.text
    assert "a&lt;b" in html


def test_names_from_the_run_are_escaped(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.log(1, {'rewards/"><b>': 1.0, 'odd"><i>': 2.0, 'seconds/"><u>': 1.0})
    parsed, _ = report(tmp_path)
    assert parsed.open == []
    assert parsed.tags["b"] == 1
    assert not parsed.tags["u"]


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no run directory: it holds none of metrics\.jsonl"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="is no directory"):
        write_report(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_the_same_run_gives_the_same_page(tmp_path: Path, write_run: WriteRun) -> None:
    run = write_run(tmp_path / "run", 3)
    assert write_report(run).read_bytes() == write_report(run).read_bytes()
