import json

import pytest

from omnigrpo.data.dataset import INSTRUCTION, DatasetError, PromptStyle, check_responses, read_dataset
from omnigrpo.data.prompt_stream import PromptStream


def write(path, items):
    path.write_text(json.dumps(items))
    return path


def item(value="happy", human="<video>\n<audio>\nWhich emotion?", **more):
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": value}]
    return {"video": "clips/a.mp4", "conversations": turns} | more


def test_bare_label(tmp_path):
    (prompt,) = read_dataset(write(tmp_path / "rl.json", [item()]), PromptStyle())
    assert prompt.solution == "happy"
    assert prompt.response is None
    assert prompt.modalities == ("video", "audio")
    assert prompt.clip.path == tmp_path / "clips/a.mp4"
    assert prompt.question == f"Which emotion?\n{INSTRUCTION}"


def test_a_bare_label_can_be_what_is_imitated(tmp_path):
    tagged = "<think>A broad smile.</think>\n<answer>happy</answer>"
    path = write(tmp_path / "sft.json", [item(" sad "), item(tagged)])
    bare = read_dataset(path, PromptStyle(instruction="", label_response="{label}"))
    assert [(p.solution, p.response, p.question) for p in bare] == [
        ("sad", "sad", "Which emotion?"),
        ("happy", tagged, "Which emotion?"),
    ]
    check_responses(bare, path)
    wrapped = read_dataset(path, PromptStyle(label_response="<answer>{label}</answer>"))
    assert wrapped[0].response == "<answer>sad</answer>"


def test_a_response_without_the_label_is_refused():
    with pytest.raises(ValueError, match=r"label_response must contain \{label\}, got 'label'"):
        PromptStyle(label_response="label")


def test_tagged_response(tmp_path):
    text = "<think>A broad smile.</think>\n<answer>happy</answer>"
    (prompt,) = read_dataset(write(tmp_path / "sft.json", [item(text)]), PromptStyle())
    assert prompt.solution == "happy"
    assert prompt.response == text


@pytest.mark.parametrize(("given", "kept"), [("Oh\n no!", "Oh no!"), ("  ", None), (None, None)])
def test_a_subtitle_is_one_line_or_none(tmp_path, given, kept):
    (prompt,) = read_dataset(write(tmp_path / "a.json", [item(subtitle=given)]), PromptStyle())
    assert prompt.subtitle == kept


def test_a_subtitle_must_be_text(tmp_path):
    path = write(tmp_path / "a.json", [item(), item(subtitle=["Oh", "no"])])
    with pytest.raises(DatasetError, match=r"a\.json, item 1: 'subtitle' must be the text.*\['Oh', 'no'\]"):
        read_dataset(path, PromptStyle())


def test_instruction_is_not_doubled(tmp_path):
    human = f"<video>\nWhich emotion? {INSTRUCTION}"
    (prompt,) = read_dataset(write(tmp_path / "a.json", [item(human=human)]), PromptStyle())
    assert prompt.question == f"Which emotion?\n{INSTRUCTION}"
    assert prompt.modalities == ("video",)


def test_media_root_and_window(tmp_path):
    path = write(tmp_path / "a.json", [item(start_seconds=1, end_seconds=2.5)])
    (prompt,) = read_dataset(path, PromptStyle(), media_root=tmp_path / "media")
    assert prompt.clip.path == tmp_path / "media/clips/a.mp4"
    assert (prompt.clip.start_seconds, prompt.clip.end_seconds) == (1.0, 2.5)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "non-empty JSON list, got an empty list"),
        ({"a": 1}, "non-empty JSON list, got a dict"),
        (["x"], "item 0: expected an object, got a str"),
        ([{"conversations": []}], "item 0: needs the key 'video' or 'audio'"),
        ([item(), item() | {"video": 3}], "item 1: 'video' must be a path, got 3"),
        ([{"video": "a.mp4"}], "item 0: 'conversations' must list"),
        ([{"video": "a.mp4", "conversations": [{"from": "gpt"}, {}]}], 'expected {"from": "human"'),
        ([item(human="<video>\n")], "asks nothing"),
        (
            [item(), item(human="Which emotion?")],
            "item 1: names a clip but its question asks for no modality: add <video> or <audio> to the human turn",
        ),
        ([item(id="a"), item(id="b"), item(id="a")], "items 0 and 2: both have the id 'a'"),
        ([item(id="000001"), item()], "items 0 and 1: both have the id '000001'"),
        ([item(start_seconds="1")], "'start_seconds' must be a number"),
    ],
)
def test_bad_items_are_named(tmp_path, items, message):
    with pytest.raises(DatasetError) as caught:
        read_dataset(write(tmp_path / "bad.json", items), PromptStyle())
    assert message in str(caught.value)
    assert "bad.json" in str(caught.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(DatasetError, match=r"nothing\.json does not exist"):
        read_dataset(tmp_path / "nothing.json", PromptStyle())
    (tmp_path / "torn.json").write_text("[{")
    with pytest.raises(DatasetError, match="not valid JSON"):
        read_dataset(tmp_path / "torn.json", PromptStyle())


def test_supervised_training_needs_responses(tmp_path):
    path = write(tmp_path / "rl.json", [item()])
    with pytest.raises(DatasetError, match="bare label 'happy'"):
        check_responses(read_dataset(path, PromptStyle()), path)


@pytest.fixture
def prompts(tmp_path):
    return read_dataset(write(tmp_path / "ten.json", [item() for _ in range(10)]), PromptStyle())


def test_stream_visits_each_prompt_once_per_epoch_in_a_new_order(prompts):
    stream = PromptStream(prompts=prompts, batch_size=4, seed=3)
    seen = [p.prompt_id for step in range(5) for p in stream.batch(step)]
    first, second = seen[:10], seen[10:]
    assert sorted(first) == sorted(second) == sorted(p.prompt_id for p in prompts)
    assert first != second


def test_stream_depends_on_seed_and_step_alone(prompts):
    stream = PromptStream(prompts=prompts, batch_size=4, seed=3)
    assert stream.batch(7) == PromptStream(prompts=prompts, batch_size=4, seed=3).batch(7)
    assert any(
        stream.batch(s) != PromptStream(prompts=prompts, batch_size=4, seed=4).batch(s) for s in range(3)
    )


def test_stream_refuses_nothing(prompts):
    with pytest.raises(ValueError, match="got 0 prompts"):
        PromptStream(prompts=(), batch_size=4, seed=0)
    with pytest.raises(ValueError, match="batch size 0"):
        PromptStream(prompts=prompts, batch_size=0, seed=0)
