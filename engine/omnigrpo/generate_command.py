"""`omnigrpo generate`: prints a checkpoint's answers about clips."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from omnigrpo.generate import Answer, GenerateConfig, Generator
from omnigrpo.media.media_files import media_files
from omnigrpo.schema import ClipStatus


def run_generate(
    generator: Generator, paths: Sequence[Path], config: GenerateConfig, *, as_json: bool
) -> bool:
    """Print every answer as soon as its batch is done; whether all clips could be used.

    As JSON it prints one object per line, with the fields of ``Answer``.
    """
    console = Console(soft_wrap=True, highlight=False)
    all_usable = True
    for answer in generator.answers(media_files(paths), config):
        all_usable &= answer.status is ClipStatus.OK
        if as_json:
            print(json.dumps(asdict(answer) | {"clip": str(answer.clip)}, ensure_ascii=False), flush=True)
        else:
            console.print(_shown(answer))
    return all_usable


def _shown(answer: Answer) -> str:
    head = f"[bold]{escape(str(answer.clip))}[/]"
    if answer.status is not ClipStatus.OK:
        return f"{head}  [red]{answer.status}[/]: {escape(answer.error or '')}"
    cut = " (cut off: raise --max-new-tokens)" if answer.finish_reason == "length" else ""
    reasoning = "" if answer.reasoning is None else f"\n  {escape(answer.reasoning)}"
    return f"{head}  [green]{escape(answer.label or '')}[/]{cut}{reasoning}"
