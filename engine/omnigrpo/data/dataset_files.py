"""The files that a dataset in R1-Omni's format may be: JSON, JSON lines, several at once, or a YAML list of them."""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


class DatasetError(ValueError):
    """A dataset file that cannot be used; the message names the file, the item and the field."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One entry of a dataset, not checked yet."""

    content: object
    file: Path
    """The file that holds it, to whose directory its clip is relative."""
    where: str
    """File and place, for messages."""


_BRACES = re.compile(r"^(.*)\{([^{}]+)\}(.*)$")
_STRATEGY = re.compile(r"(first|end|random):(\d+)(%?)")
_SEED = 42
"""Of ``random``; R1-Omni's own."""


def read_items(path: Path) -> list[Item]:
    """Read every item of ``path``.

    ``name.json`` is a list, ``name.jsonl`` has an object per line, ``dir/{a,b}.json`` stands for both files in order.
    A ``.yaml`` file holds ``datasets``, a list of ``json_path`` (relative to the YAML file) and ``sampling_strategy``:
    ``all``, or ``first``, ``end`` or ``random`` with a count or a share, e.g. ``random:25%``.

    Raises:
        DatasetError: a file that is missing, cannot be parsed or holds no items, or another strategy.
    """
    if path.suffix in (".yaml", ".yml"):
        return list(_from_yaml(path))
    braces = _BRACES.match(str(path))
    if braces is not None:
        before, names, after = braces.groups()
        return [
            item for name in names.split(",") for item in read_items(Path(f"{before}{name.strip()}{after}"))
        ]
    return _json_lines(path) if path.suffix == ".jsonl" else _json_list(path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DatasetError(
            f"dataset {path} does not exist: check the path (data.train, data.evaluate)"
        ) from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"dataset {path} is not valid JSON: {error}") from error


def _json_list(path: Path) -> list[Item]:
    try:
        items = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise DatasetError(f"dataset {path} is not valid JSON: {error}") from error
    if not isinstance(items, list) or not items:
        kind = "an empty list" if items == [] else f"a {type(items).__name__}"
        raise DatasetError(f"dataset {path} must be a non-empty JSON list, got {kind}")
    return [Item(content=c, file=path, where=f"{path}, item {i}") for i, c in enumerate(items)]


def _json_lines(path: Path) -> list[Item]:
    items: list[Item] = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            raise DatasetError(f"dataset {path}, line {number} is not valid JSON: {error}") from error
        items.append(Item(content=content, file=path, where=f"{path}, line {number}"))
    if not items:
        raise DatasetError(f"dataset {path} has no lines: it needs an object per line")
    return items


def _from_yaml(path: Path) -> Iterator[Item]:
    import yaml

    try:
        document = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        raise DatasetError(f"dataset {path} is not valid YAML: {error}") from error
    sources = document.get("datasets") if isinstance(document, dict) else None
    if not isinstance(sources, list) or not sources:
        raise DatasetError(f"dataset {path} must list 'datasets', each with a json_path")
    for number, source in enumerate(sources):
        where = f"{path}, datasets[{number}]"
        if not isinstance(source, dict) or not isinstance(source.get("json_path"), str):
            raise DatasetError(f"{where}: needs the key 'json_path', got {source!r}")
        items = read_items(path.parent / source["json_path"])
        yield from _sampled(items, source.get("sampling_strategy", "all"), where)


def _sampled(items: list[Item], strategy: object, where: str) -> list[Item]:
    if strategy == "all":
        return items
    match = _STRATEGY.fullmatch(strategy) if isinstance(strategy, str) else None
    if match is None:
        raise DatasetError(
            f"{where}: sampling_strategy must be all, first:N, end:N or random:N (N a count, or a share as 25%), "
            f"got {strategy!r}"
        )
    kind, number, percent = match.groups()
    count = -(-len(items) * int(number) // 100) if percent else int(number)
    count = min(count, len(items))
    if kind == "random":
        return random.Random(_SEED).sample(items, count)
    return items[:count] if kind == "first" else items[len(items) - count :]
