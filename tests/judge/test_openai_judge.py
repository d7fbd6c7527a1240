"""The endpoint's protocol, against a server on this machine."""

import asyncio
import base64
from pathlib import Path

import pytest
from aiohttp import web

from omnigrpo.judge.interface import Comparison, JudgeError, Preference
from omnigrpo.judge.openai_judge import OpenAIJudge, OpenAIJudgeConfig, read_verdict


def judge_once(tmp_path: Path, body: object, *, status: int = 200, **settings) -> tuple[Preference, dict]:
    seen: dict = {}

    async def answer(request: web.Request) -> web.Response:
        seen.update(await request.json(), key=request.headers.get("Authorization"))
        return web.json_response(body, status=status)

    async def run() -> Preference:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            config = OpenAIJudgeConfig(url=f"http://127.0.0.1:{port}/v1", model="judge", **settings)
            clip = tmp_path / "clip.mp4"
            clip.write_bytes(b"bytes of a clip")
            comparison = Comparison(clip=clip, question="How is she?", first="sad", second="happy")
            return await OpenAIJudge(config)(comparison)
        finally:
            await runner.cleanup()

    return asyncio.run(run()), seen


def chat(text: object) -> dict:
    return {"choices": [{"message": {"content": text}}]}


def test_the_judge_gets_the_clip_and_both_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "abc")
    verdict, seen = judge_once(tmp_path, chat("2"), api_key_variable="JUDGE_KEY")
    assert verdict == "second"
    clip, text = seen["messages"][0]["content"]
    data = clip["video_url"]["url"].removeprefix("data:video/mp4;base64,")
    assert base64.b64decode(data) == b"bytes of a clip"
    assert all(part in text["text"] for part in ("How is she?", "1: sad", "2: happy"))
    assert (seen["model"], seen["temperature"], seen["key"]) == ("judge", 0.0, "Bearer abc")


def test_a_judge_of_texts_gets_no_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    _, seen = judge_once(tmp_path, chat("tie"), sends_clip=False)
    assert [part["type"] for part in seen["messages"][0]["content"]] == ["text"]
    assert seen["key"] is None


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"error": "overloaded"}, 503, "answers 503: .*overloaded"),
        ({}, 200, "no chat completion"),
        (chat(None), 200, "holds no text"),
        (chat("I like both."), 200, "no single verdict: 'I like both.'"),
    ],
)
def test_answers_without_a_verdict(tmp_path: Path, body: object, status: int, message: str) -> None:
    with pytest.raises(JudgeError, match=message):
        judge_once(tmp_path, body, status=status)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [("1", "first"), ("Description 2.", "second"), ("It is a Tie", "tie"), ("2, clearly 2", "second")],
)
def test_verdicts(text: str, verdict: Preference) -> None:
    assert read_verdict(text) == verdict


@pytest.mark.parametrize("text", ["", "12", "1 or 2", "untied"])
def test_no_verdict(text: str) -> None:
    with pytest.raises(JudgeError):
        read_verdict(text)


def test_a_prompt_without_the_answers() -> None:
    with pytest.raises(ValueError, match="lacks second"):
        OpenAIJudgeConfig(url="http://judge", model="judge", prompt="{first}?")
