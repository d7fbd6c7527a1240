"""Settings of rollouts on SGLang servers; imports nothing of them, so that a configuration can be read anywhere."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

ServerMedia = Literal["path", "bytes", "rows"]
"""path: the clip's path, for servers that see the trainer's file system; bytes: the clip itself; rows: the prefix rows
that the trainer made of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """What servers are sent, and how long they are waited for."""

    media: ServerMedia = "path"
    """What a prompt's clip is sent as. With path and bytes the servers decode and encode it themselves, so start them
    with ``--media raw``; rows suit servers started with ``--media precomputed``, which hold no towers."""
    attempts: int = 3
    """Servers that a group is drawn on before the step fails; each time all its samples are drawn anew."""
    max_samples: int = 4096
    """Samples under way at once, on all servers together; the servers queue what they have no room for."""
    bucket_mib: int = 512
    """Weights published at once, MiB; twice as much is alive meanwhile, here and on each server's devices."""
    trainer_address: str | None = None
    """Where the servers reach this process for its weights; None is its address on the way to them."""
    probe_timeout_seconds: float = 30.0
    """For a server to say that it is alive."""
    watch_seconds: float = 10.0
    """Between two looks at every server that is drawing samples; one that fails two of them is given up."""
    update_timeout_seconds: float = 300.0
    """For one bucket of weights, and for joining the group that it is sent over."""
    timeout_seconds: float = 600.0
    """For a reader of a stream without a finished group; not counted while paused."""

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no rollout can work with."""
        if self.media not in get_args(ServerMedia):
            raise ValueError(
                f"server.media must be one of {', '.join(get_args(ServerMedia))}, got {self.media!r}"
            )
        for name in ("attempts", "max_samples", "bucket_mib"):
            if getattr(self, name) < 1:
                raise ValueError(f"server.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("probe_timeout_seconds", "watch_seconds", "update_timeout_seconds", "timeout_seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"server.{name} must be a number above 0, got {value}")


def check_servers(servers: tuple[str, ...]) -> None:
    """Raise ValueError unless these are distinct addresses of HTTP servers, at least one."""
    if not servers:
        raise ValueError(
            "rollout.servers is empty: give the addresses of SGLang servers, e.g. "
            '["http://10.0.0.1:30000"]; `omnigrpo serve` starts one'
        )
    for url in servers:
        if not url.startswith(("http://", "https://")) or url.endswith("/"):
            raise ValueError(
                f"rollout.servers holds {url!r}: an address reads http://HOST:PORT, without a path or slash"
            )
    twice = sorted({url for url in servers if servers.count(url) > 1})
    if twice:
        raise ValueError(f"rollout.servers names {', '.join(twice)} more than once")
