# pyright: reportMissingImports=false
# aiohttp comes with the extra "servers".
"""A judge behind an OpenAI-compatible chat endpoint (vLLM, SGLang, a hosted model)."""

import base64
import mimetypes
import os
import re
from dataclasses import dataclass

from omnigrpo.judge.interface import Comparison, JudgeError, Preference

PROMPT = (
    "You see a video clip and two descriptions of the emotional state of the person in it. Decide which one fits what "
    "can be seen and heard better.\n\nQuestion: {question}\n\nDescription 1: {first}\n\nDescription 2: {second}\n\n"
    "Answer with one word: 1, 2, or tie."
)
_VERDICT = re.compile(r"\b(1|2|tie)\b", re.IGNORECASE)
_MEANING: dict[str, Preference] = {"1": "first", "2": "second", "tie": "tie"}
_SHOWN = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenAIJudgeConfig:
    """The endpoint and what it is asked."""

    url: str
    """Base address, e.g. ``http://judge:8000/v1``."""
    model: str
    prompt: str = PROMPT
    """With ``{question}``, ``{first}`` and ``{second}``."""
    sends_clip: bool = True
    """Send the clip's bytes as a ``video_url`` data address; False for a judge that reads only text."""
    api_key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key; where it is not set none is sent."""
    max_tokens: int = 16
    temperature: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for a prompt that does not show both answers."""
        missing = [name for name in ("first", "second") if f"{{{name}}}" not in self.prompt]
        if missing:
            raise ValueError(
                f"judge.prompt must contain {{first}} and {{second}}, lacks {', '.join(missing)}"
            )


class OpenAIJudge:
    """Asks the endpoint once per comparison, over a connection of its own."""

    def __init__(self, config: OpenAIJudgeConfig) -> None:
        self._config = config

    async def __call__(self, comparison: Comparison) -> Preference:
        """Compare; raises JudgeError for an answer without a verdict, or with several."""
        import aiohttp

        key = os.environ.get(self._config.api_key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        address = f"{self._config.url.rstrip('/')}/chat/completions"
        async with (
            aiohttp.ClientSession() as session,
            session.post(address, json=self._request(comparison), headers=headers) as answer,
        ):
            if answer.status >= 400:
                raise JudgeError(f"{address} answers {answer.status}: {(await answer.text())[:_SHOWN]}")
            return read_verdict(_content(await answer.json()))

    def _request(self, comparison: Comparison) -> dict[str, object]:
        text = self._config.prompt.format(
            question=comparison.question, first=comparison.first, second=comparison.second
        )
        content: list[dict[str, object]] = [{"type": "text", "text": text}]
        if self._config.sends_clip:
            kind = mimetypes.guess_type(comparison.clip.name)[0] or "video/mp4"
            data = base64.b64encode(comparison.clip.read_bytes()).decode()
            content.insert(0, {"type": "video_url", "video_url": {"url": f"data:{kind};base64,{data}"}})
        return {
            "model": self._config.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._config.max_tokens,
            "temperature": self._config.temperature,
        }


def read_verdict(text: str) -> Preference:
    """The one verdict in a text; raises JudgeError for none, or different ones."""
    found = {match.lower() for match in _VERDICT.findall(text)}
    if len(found) != 1:
        raise JudgeError(f"the judge's answer holds no single verdict: {text[:_SHOWN]!r}")
    return _MEANING[found.pop()]


def _content(answer: object) -> str:
    try:
        content = answer["choices"][0]["message"]["content"]  # type: ignore[index] - checked here
    except (KeyError, IndexError, TypeError) as error:
        raise JudgeError(f"the endpoint's answer is no chat completion: {str(answer)[:_SHOWN]}") from error
    if not isinstance(content, str):
        raise JudgeError(f"the endpoint's answer holds no text: {str(answer)[:_SHOWN]}")
    return content
