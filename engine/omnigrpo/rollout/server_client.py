# pyright: reportMissingImports=false
# aiohttp comes with the extra "servers".
"""HTTP to SGLang servers and their router, for one event loop."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import aiohttp

from omnigrpo.rollout.interface import RolloutError

_SHOWN = 600


class ServerLostError(OSError):
    """A server did not answer, or answered that it cannot at the moment: another one may."""


class ServerClient:
    """One session; every answer that is not a success raises."""

    def __init__(self) -> None:
        """Must be called on the event loop that uses it."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None),
        )

    async def get(self, url: str, *, timeout_seconds: float) -> Any:
        """The JSON of an answer, None for an empty one; raises as ``post`` does."""
        return await self._call("GET", url, None, {}, timeout_seconds)

    async def post(
        self,
        url: str,
        content: Mapping[str, object],
        *,
        timeout_seconds: float | None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """Send JSON and return the answer's.

        Raises ServerLostError when it cannot be reached, breaks off, fails (5xx) or takes longer; RolloutError when it
        refuses (4xx).
        """
        return await self._call("POST", url, content, headers or {}, timeout_seconds)

    async def delete(self, url: str, *, timeout_seconds: float) -> Any:
        """As ``get``."""
        return await self._call("DELETE", url, None, {}, timeout_seconds)

    async def has_route(self, url: str, *, timeout_seconds: float) -> bool:
        """Whether a server knows this address for some method; raises ServerLostError when it cannot be reached."""
        return (await self._status("OPTIONS", url, {}, {}, timeout_seconds))[0] != 404

    async def close(self) -> None:
        """End the session."""
        await self._session.close()

    async def _call(
        self,
        method: str,
        url: str,
        content: Mapping[str, object] | None,
        headers: Mapping[str, str],
        timeout_seconds: float | None,
    ) -> Any:
        options: dict[str, Any] = {} if content is None else {"json": content}
        status, body = await self._status(method, url, options, headers, timeout_seconds)
        if status >= 500:
            raise ServerLostError(f"{url} failed with status {status}: {_words(body)}")
        if status >= 400:
            raise RolloutError(f"{url} refused with status {status}: {_words(body)}")
        return _parsed(body)

    async def _status(
        self,
        method: str,
        url: str,
        options: Mapping[str, Any],
        headers: Mapping[str, str],
        timeout_seconds: float | None,
    ) -> tuple[int, bytes]:
        try:
            async with (
                asyncio.timeout(timeout_seconds),
                self._session.request(method, url, headers=headers, **options) as answer,
            ):
                return answer.status, await answer.read()
        except TimeoutError:
            raise ServerLostError(f"{url} did not answer within {timeout_seconds} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ServerLostError(f"{url} cannot be reached: {error or type(error).__name__}") from error


def _parsed(body: bytes) -> Any:
    """JSON, or the text of what is none (SGLang answers some commands in words)."""
    if not body.strip():
        return None
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")


def _words(body: bytes) -> str:
    """What an error answer says."""
    parsed = _parsed(body)
    if isinstance(parsed, dict):
        error = parsed.get("error", parsed)
        parsed = error.get("message", error) if isinstance(error, dict) else error
    return str(parsed)[:_SHOWN]
