"""The gate: BERT reads the question, an MLP turns it into the weights of the three visual branches.

Shape suffixes: ``Q`` distinct questions, ``W`` BERT width.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from omnigrpo.model.config import GateConfig

if TYPE_CHECKING:
    from transformers import BertModel

NUM_BRANCHES = 3
MAX_CACHED_QUESTIONS = 4096


def build_bert(config: GateConfig) -> "BertModel":
    """Build an uninitialised BERT encoder with the pooler that its checkpoint holds and nothing uses."""
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            intermediate_size=config.ffn_width,
            max_position_embeddings=config.max_positions,
        )
    )


def build_gate(config: GateConfig) -> nn.Sequential:
    """Build the MLP whose softmax weighs the branches."""
    return nn.Sequential(
        nn.Linear(config.width, config.gate_width), nn.GELU(), nn.Linear(config.gate_width, NUM_BRANCHES)
    )


class QuestionStates:
    """BERT's [CLS] state of each question; remembered while BERT is a constant (frozen, without dropout).

    Questions run one at a time, so a state never depends on the questions that share a call.
    """

    def __init__(self, bert: "BertModel") -> None:
        self._bert = bert
        self._cache: dict[tuple[int, ...], Tensor] = {}
        self._cached_weights: tuple[tuple[int, int], ...] = ()

    def __call__(self, questions: Sequence[tuple[int, ...]]) -> Tensor:
        """Return the states of the questions, ``[Q, W]``; differentiable unless BERT is frozen.

        With dropout live, each one has a mask of its own, equal questions too.
        """
        if self._bert.training or any(p.requires_grad for p in self._bert.parameters()):
            return torch.stack([self._state(question) for question in questions])
        weights = tuple((p.data_ptr(), p._version) for p in self._bert.parameters())
        if weights != self._cached_weights or len(self._cache) > MAX_CACHED_QUESTIONS:
            self._cache.clear()
            self._cached_weights = weights
        with torch.no_grad():
            for question in questions:
                if question not in self._cache:
                    self._cache[question] = self._state(question)
        # The stack is a new tensor: states cached in inference mode may meet gradients later.
        return torch.stack([self._cache[question] for question in questions])

    def _state(self, question: tuple[int, ...]) -> Tensor:
        device = self._bert.embeddings.word_embeddings.weight.device
        ids_1L = torch.tensor([question], dtype=torch.int64, device=device)
        return self._bert(input_ids=ids_1L).last_hidden_state[0, 0]
