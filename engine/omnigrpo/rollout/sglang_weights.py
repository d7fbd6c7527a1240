"""Which weights SGLang holds: those of one version, or, after a transfer that failed on the way, a mixture."""

from collections.abc import Awaitable, Callable, Sequence

from torch import Tensor

from omnigrpo.rollout.interface import RolloutError
from omnigrpo.rollout.weight_buckets import WeightBuckets

Named = Sequence[tuple[str, Tensor]]


class WeightsRefusedError(RolloutError):
    """SGLang has no such weights, or of other shapes, and copied nothing of the bucket."""


class SGLangWeights:
    """Sends weights bucket by bucket; for one event loop."""

    def __init__(
        self,
        buckets: WeightBuckets,
        *,
        send: Callable[[Named, int | None], Awaitable[None]],
        name_anew: Callable[[int], Awaitable[None]],
        free_bytes: Callable[[], int] | None,
    ) -> None:
        """``send`` copies one bucket, the last one with the version; ``name_anew`` gives the version alone.

        ``free_bytes`` says how much shared memory a bucket may take; None where it takes none.
        """
        self._buckets = buckets
        self._send, self._name_anew, self._free_bytes = send, name_anew, free_bytes
        self._version = 0
        self._mixture: str | None = None
        self._mixed: frozenset[str] = frozenset()
        """Weights that may be of another version than the rest."""

    @property
    def version(self) -> int:
        """The last one that arrived whole."""
        return self._version

    def check(self) -> None:
        """Raise RolloutError unless all weights are of one version."""
        if self._mixture is not None:
            raise RolloutError(self._mixture)

    async def take(self, chosen: Named, version: int) -> None:
        """Send them all; until the last bucket has arrived, ``check`` raises, however this ends.

        Raises RolloutError when SGLang refuses a bucket, when one would not fit the shared memory (nothing has changed
        then), or when the weights are a mixture and not all of those that are mixed are among these.
        """
        planned = list(self._buckets.plan(chosen))
        self._check_repaired(chosen)
        self._check_room(planned)
        if not planned:
            await self._name_anew(version)
        for index, bucket in enumerate(planned):
            await self._give(bucket, index + 1, len(planned), version)
        self._version, self._mixture, self._mixed = version, None, frozenset()

    async def _give(self, bucket: Named, number: int, count: int, version: int) -> None:
        """Send one bucket, and count on its having been copied in part until SGLang has answered."""
        cast = self._buckets.cast(bucket)
        before = self._mixture, self._mixed
        self._mixture = (
            f"SGLang may hold {number} of {count} buckets of version {version} and the rest of version "
            f"{self._version}: publish all weights again, or build a new engine"
        )
        self._mixed |= {name for name, _ in bucket}
        try:
            await self._send(cast, version if number == count else None)
        except WeightsRefusedError as error:
            self._mixture, self._mixed = before
            state = self._mixture or f"SGLang goes on with version {self._version}"
            raise RolloutError(f"{error}; {state}") from error
        except RolloutError as error:
            raise RolloutError(f"{error}; {self._mixture}") from error

    def _check_repaired(self, chosen: Named) -> None:
        missing = self._mixed - {name for name, _ in chosen}
        if missing:
            raise RolloutError(f"{self._mixture} ({len(missing)} are missing, {min(missing)} among them)")

    def _check_room(self, planned: Sequence[Named]) -> None:
        if self._free_bytes is None or not planned:
            return
        largest, free = max(map(self._buckets.size_bytes, planned)), self._free_bytes()
        if largest > free:
            raise RolloutError(
                f"a bucket of weights needs {largest / 2**20:.1f} MiB of shared memory, but {free / 2**20:.1f} MiB are "
                "free in /dev/shm: enlarge it (docker: --shm-size), or lower sglang.bucket_bytes"
            )
