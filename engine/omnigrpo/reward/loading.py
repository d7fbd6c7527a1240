"""From the name of a reward in a config to the function."""

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TypeGuard, cast

from pydantic import TypeAdapter, ValidationError

from omnigrpo.reward.grounded import AudioAware, Grounded
from omnigrpo.reward.interface import ContextReward, Reward
from omnigrpo.reward.length import LengthCap, LengthRange
from omnigrpo.reward.tagged_answer import Accuracy, Format, Preset

Option = bool | int | float | str | list[str]

BUILT_IN: dict[str, type[Accuracy | Format | Grounded | AudioAware | LengthRange | LengthCap]] = {
    "accuracy": Accuracy,
    "format": Format,
    "grounded": Grounded,
    "audio_aware": AudioAware,
    "length_range": LengthRange,
    "length_cap": LengthCap,
}
_NO_OPTIONS = ("preset", "aliases")
"""Fields of built-ins that are set elsewhere."""


def load_reward(name: str, preset: Preset, options: Mapping[str, Option]) -> Reward | ContextReward:
    """The built-in ``name``, or the function behind ``package.module:function`` or ``path/file.py:function``.

    Preset and options apply to built-ins only. Raises ValueError for a name that leads to no function, and for options
    that a built-in does not have or cannot use.
    """
    if ":" in name:
        if options:
            raise ValueError(
                f"reward {name!r}: options {sorted(options)} are for built-in rewards; give a function of yours its own"
            )
        return _user_function(name)
    if name not in BUILT_IN:
        raise ValueError(_unknown(name))
    return _built_in(name, preset, options)


def reads_model(reward: Reward | ContextReward) -> TypeGuard[ContextReward]:
    """Whether the reward takes a ``context``."""
    try:
        return "context" in inspect.signature(reward).parameters
    except ValueError:  # A function of C, which says nothing of its parameters.
        return False


def component_name(name: str) -> str:
    """What a reward is called in metrics: the built-in's name, or the user function's."""
    return name.rpartition(":")[2]


def _built_in(name: str, preset: Preset, options: Mapping[str, Option]) -> Reward | ContextReward:
    kind = BUILT_IN[name]
    fields = [f.name for f in dataclasses.fields(kind) if f.init]
    known = [field for field in fields if field not in _NO_OPTIONS]
    for option in options:
        if option not in known:
            nearest = difflib.get_close_matches(option, known, n=1)
            advice = f"did you mean {nearest[0]!r}?" if nearest else f"it has {', '.join(known) or 'none'}"
            raise ValueError(f"reward {name!r} has no option {option!r}: {advice}")
    given = dict(options) | ({"preset": preset.value} if "preset" in fields else {})
    try:
        return TypeAdapter(kind).validate_json(json.dumps(given), strict=True)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(str(part) for part in e['loc']) or 'options'}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        )
        raise ValueError(f"reward {name!r}: {wrong}, got {dict(options)}") from error


def _unknown(name: str) -> str:
    nearest = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.5)
    suggestion = f"did you mean {nearest[0]!r}? " if nearest else ""
    return (
        f"unknown reward {name!r}: {suggestion}Built-in rewards are {', '.join(BUILT_IN)}; "
        "a function of yours is written 'package.module:function' or 'path/to/file.py:function'"
    )


def _user_function(name: str) -> Reward | ContextReward:
    source, _, attribute = name.rpartition(":")
    module = _module_of_file(Path(source), name) if source.endswith(".py") else _module(source, name)
    function = getattr(module, attribute, None)
    if function is None:
        candidates = [
            key for key, value in vars(module).items() if callable(value) and not key.startswith("_")
        ]
        nearest = difflib.get_close_matches(attribute, candidates, n=1)
        suggestion = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"reward {name!r}: {source} has no {attribute!r}{suggestion}")
    if not callable(function):
        raise ValueError(
            f"reward {name!r}: {attribute!r} is a {type(function).__name__}, not a function of a group"
        )
    return cast("Reward | ContextReward", function)


def _module(dotted: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(dotted)
    # What runs here is the user's code: whatever it raises is passed on as the cause, with its place.
    except Exception as error:
        place = _place(error)
        if place is None:
            raise ValueError(
                f"reward {name!r}: cannot import {dotted!r} ({error}); check the spelling, or give the file "
                "as 'path/to/file.py:function'"
            ) from error
        raise ValueError(f"reward {name!r}: cannot load {place} ({type(error).__name__}: {error})") from error


def _module_of_file(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        raise ValueError(
            f"reward {name!r}: {path.resolve()} does not exist; the path is relative to {Path.cwd()}"
        )
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    module_name = f"omnigrpo_user_reward_{digest}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Registered before it runs: dataclasses and pickling look their module up by name.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    # What runs here is the user's code: whatever it raises is passed on as the cause, with its place.
    except Exception as error:
        del sys.modules[module_name]
        place = _place(error) or path
        raise ValueError(f"reward {name!r}: cannot load {place} ({type(error).__name__}: {error})") from error
    return module


def _place(error: Exception) -> str | None:
    """File and line of the user's top-level code that failed to run; None when none of it did run or parse."""
    importers = (__file__, importlib.__file__)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in importers and not frame.filename.startswith("<frozen importlib")
    ]
    if frames:
        line = next(frame.lineno for frame in reversed(frames) if frame.filename == frames[0].filename)
        return f"{frames[0].filename}, line {line}"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    return None
