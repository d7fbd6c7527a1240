"""NVIDIA DALI, imported when it is first used: it takes two seconds, and not every machine has it."""

import importlib
from types import ModuleType


def load_dali() -> ModuleType:
    """Return DALI's dynamic mode, ``nvidia.dali.experimental.dynamic``.

    Raises:
        ImportError: DALI is not installed.
    """
    try:
        return importlib.import_module("nvidia.dali.experimental.dynamic")
    except ModuleNotFoundError as error:
        if error.name not in ("nvidia", "nvidia.dali"):
            raise  # DALI is there and lacks something else: its own message says what.
        raise ImportError(
            "DALI is not installed; run pip install 'omnigrpo[gpu]', or pip install 'omnigrpo[dali]' for its CPU "
            "operators alone"
        ) from error
