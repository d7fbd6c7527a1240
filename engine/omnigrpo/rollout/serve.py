"""The command that starts an SGLang server for rollouts; imports nothing of SGLang."""

import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omnigrpo.model.checkpoint_format import CONFIG_FILE
from omnigrpo.rollout.sglang_plugin.names import PRECOMPUTED_KEY

_MEDIA = ("raw", "precomputed")
_DEVICES = ("cpu", "cuda")
_DTYPES = ("auto", "float32", "bfloat16")
_CPU_ROWS = 32768


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """One server."""

    model: Path
    """Checkpoint directory, the one that the run starts from."""
    port: int
    host: str = "127.0.0.1"
    media: str = "raw"
    """raw: the server holds the towers and takes clips; precomputed: it takes ready-made rows."""
    device: str = "cuda"
    dtype: str = "auto"
    """auto, float32 or bfloat16; auto takes the checkpoint's."""
    tensor_parallel: int = 1
    max_total_tokens: int | None = None
    """Rows of the KV cache; None fills the device's memory on CUDA, and is 32768 on a CPU."""
    memory_saver: bool = False
    """Let a run release the memory of KV cache and weights (CUDA, torch_memory_saver); weights wait on the host."""
    more: tuple[str, ...] = ()
    """Further arguments of ``sglang.launch_server``."""

    def __post_init__(self) -> None:
        """Raises ValueError for a choice that there is not."""
        for name, choices in (("media", _MEDIA), ("device", _DEVICES), ("dtype", _DTYPES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")


def serve_command(config: ServeConfig) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment variables to add to it.

    Raises ValueError for a directory that holds no checkpoint.
    """
    if not (config.model / CONFIG_FILE).is_file():
        raise ValueError(f"{config.model} holds no {CONFIG_FILE}: give a checkpoint directory")
    arguments: dict[str, object] = {
        "model-path": config.model.resolve(),
        "host": config.host,
        "port": config.port,
        "device": config.device,
        "dtype": config.dtype,
        "tp-size": config.tensor_parallel,
        "grammar-backend": "none",
        "weight-version": "0",
    }
    if config.media == "precomputed":
        arguments["json-model-override-args"] = json.dumps({PRECOMPUTED_KEY: True})
    rows = config.max_total_tokens or (_CPU_ROWS if config.device == "cpu" else None)
    if rows is not None:
        arguments["max-total-tokens"] = rows
    flags = ["--skip-server-warmup"]
    if config.memory_saver:
        flags += ["--enable-memory-saver", "--enable-weights-cpu-backup"]
    # Rows of a clip change with the projectors' weights, and SGLang's cache of them would not notice.
    environment = {"SGLANG_VLM_CACHE_SIZE_MB": "0"}
    if config.device == "cpu":
        arguments |= {"attention-backend": "torch_native", "sampling-backend": "pytorch"}
        flags += ["--disable-cuda-graph", "--disable-overlap-schedule"]
        environment["CUDA_VISIBLE_DEVICES"] = ""
    named = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "sglang.launch_server", *named, *flags, *config.more]
    return command, environment


def serve(config: ServeConfig) -> None:
    """Become that server. Raises ImportError where SGLang is not installed."""
    command, environment = serve_command(config)
    if importlib.util.find_spec("sglang") is None:
        raise ImportError(
            "SGLang is not installed in this environment: run this command in the one that `make sglang` builds, or "
            "pip install 'omnigrpo[sglang]'"
        )
    os.execve(command[0], command, os.environ | environment)


def shown(command: Sequence[str], environment: dict[str, str]) -> str:
    """Both as one line for a shell."""
    return " ".join(
        [*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(command)]
    )
