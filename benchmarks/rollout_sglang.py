"""SGLang among the peers of bench_rollout: the real one, in process, by the same weights."""

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch

from omnigrpo.data.synthetic.dataset import vocabulary_texts
from omnigrpo.model.checkpoint_format import Tokenizers, save_model
from omnigrpo.model.config import AudioConfig, HumanOmniConfig, VisionConfig
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.model.tiny_tokenizer import build_gate_tokenizer, build_tokenizer
from omnigrpo.rollout.interface import GroupRequest, SamplingParams, collect
from omnigrpo.rollout.sglang_config import SGLangConfig
from omnigrpo.rollout.sglang_engine import SGLangEngine
from omnigrpo.schema import Prefix
from update_work import TextPolicy


@dataclass(frozen=True, kw_only=True)
class Sglang:
    """One request with n=G; the cache of prefixes is emptied before each call."""

    engine: SGLangEngine
    prefix: Prefix
    name: str = "SGLang"

    def draw(self, num_samples: int, num_tokens: int) -> int:
        """Draw tokens at temperature 1; see `Peer`."""
        self.engine.release_memory()  # Which empties the cache, and here has nothing to release.
        request = GroupRequest(prefix=self.prefix, seeds=tuple(range(num_samples)))
        (group,) = collect(self.engine.generate([request], SamplingParams(max_new_tokens=num_tokens)), 1)
        assert [len(completion.token_ids) for completion in group] == [num_tokens] * num_samples
        rows = len(self.prefix.inputs.token_ids_P)
        return rows + sum(rows - completion.cached_tokens - 1 for completion in group)


@contextmanager
def open_sglang(policy: TextPolicy, prefix: Prefix) -> Iterator[Sglang]:
    """Start SGLang on a checkpoint of the policy's geometry and give it the policy's weights; ends it afterwards.

    Raises ImportError where SGLang is not installed.
    """
    device = cast('Literal["cpu", "cuda"]', policy.head_weight_VD.device.type)
    with tempfile.TemporaryDirectory() as directory:
        _write_checkpoint(Path(directory), policy)
        rows = len(prefix.inputs.token_ids_P)
        settings = SGLangConfig(max_total_tokens=max(1 << 14, 64 * rows))
        engine = SGLangEngine(Path(directory), settings, device=device, dtype=policy.head_weight_VD.dtype)
        with closing(engine):
            weights = {f"model.{name}": p.detach() for name, p in policy.decoder.named_parameters()}
            if policy.lm_head is not None:
                weights["lm_head.weight"] = policy.lm_head.weight.detach()
            engine.publish(weights.items(), 1)
            yield Sglang(engine=engine, prefix=prefix)


def _write_checkpoint(directory: Path, policy: TextPolicy) -> None:
    """HumanOmni's layout, with towers of one layer that nobody builds."""
    texts = vocabulary_texts()
    config = HumanOmniConfig(
        vision=VisionConfig(num_layers=1), audio=AudioConfig(num_layers=1), decoder=policy.decoder.config
    )
    model = HumanOmni(config).to(policy.head_weight_VD.dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    tokenizers = Tokenizers(text=build_tokenizer(texts), gate=build_gate_tokenizer(texts))
    save_model(model, tokenizers, directory)
