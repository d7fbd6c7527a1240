"""Clip features in memory: the least recently used leave when a byte budget is reached."""

from collections import OrderedDict

from omnigrpo.schema import ClipFeatures


class MemoryTier:
    """An LRU map from key to features; the caller holds a lock."""

    def __init__(self, budget_bytes: int) -> None:
        if budget_bytes < 0:
            raise ValueError(f"memory_budget_bytes must not be negative, got {budget_bytes}")
        self._budget_bytes = budget_bytes
        self._features: OrderedDict[str, ClipFeatures] = OrderedDict()
        self.num_bytes = 0
        """Bytes of all features here; never more than the budget."""

    def get(self, key: str) -> ClipFeatures | None:
        """Return the features of ``key`` and count them as used."""
        features = self._features.get(key)
        if features is not None:
            self._features.move_to_end(key)
        return features

    def put(self, key: str, features: ClipFeatures) -> int:
        """Keep features, unless they alone exceed the budget; returns how many others had to leave."""
        old = self._features.pop(key, None)
        self.num_bytes -= 0 if old is None else num_bytes_of(old)
        if num_bytes_of(features) > self._budget_bytes:
            return 0
        self._features[key] = features
        self.num_bytes += num_bytes_of(features)
        evicted = 0
        while self.num_bytes > self._budget_bytes:
            _, oldest = self._features.popitem(last=False)
            self.num_bytes -= num_bytes_of(oldest)
            evicted += 1
        return evicted


def num_bytes_of(features: ClipFeatures) -> int:
    """Bytes of the tensors."""
    return sum(tensor.nbytes for tensor in (features.vision_FND, features.audio_AD) if tensor is not None)
