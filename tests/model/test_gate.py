"""The question gate: BERT's [CLS] state, its cache, and the branch weights."""

import pytest
import torch
from torch import nn
from transformers import BertModel

from omnigrpo.model.config import HumanOmniConfig
from omnigrpo.model.gate import QuestionStates, build_bert, build_gate

QUESTIONS = [(2, 9, 30, 41, 3), (2, 8, 3)]


@pytest.fixture
def bert(small_config: HumanOmniConfig) -> BertModel:
    torch.manual_seed(0)
    return build_bert(small_config.gate).eval().requires_grad_(False)


def _count_runs(bert: BertModel) -> list[int]:
    runs: list[int] = []
    bert.register_forward_hook(lambda *_: runs.append(1))
    return runs


def test_states_are_the_cls_rows_of_a_padded_batch(bert: BertModel) -> None:
    ids = torch.tensor([[2, 9, 30, 41, 3], [2, 8, 3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    expected = bert(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
    torch.testing.assert_close(QuestionStates(bert)(QUESTIONS), expected, rtol=0, atol=1e-6)


def test_a_frozen_bert_reads_each_question_once(bert: BertModel) -> None:
    states, runs = QuestionStates(bert), _count_runs(bert)
    first = states(QUESTIONS)
    assert torch.equal(states(QUESTIONS[::-1]).flip(0), first)
    assert len(runs) == 2


def test_changed_weights_empty_the_cache(bert: BertModel) -> None:
    states = QuestionStates(bert)
    before = states(QUESTIONS)
    bert.load_state_dict({name: tensor * 1.5 for name, tensor in bert.state_dict().items()})
    assert not torch.allclose(states(QUESTIONS), before)
    assert states(QUESTIONS).dtype == torch.float32
    bert.double()
    assert states(QUESTIONS).dtype == torch.float64


def test_a_training_bert_is_neither_cached_nor_detached(bert: BertModel) -> None:
    bert.requires_grad_(True)
    states, runs = QuestionStates(bert), _count_runs(bert)
    states(QUESTIONS)
    states(QUESTIONS).sum().backward()
    assert len(runs) == 4
    assert bert.get_input_embeddings().weight.grad is not None


def test_live_dropout_is_not_cached(bert: BertModel) -> None:
    states = QuestionStates(bert.train())
    torch.manual_seed(0)
    assert not torch.equal(states(QUESTIONS), states(QUESTIONS))


def test_states_cached_in_inference_mode_can_meet_gradients_later(
    bert: BertModel, small_config: HumanOmniConfig
) -> None:
    states, gate = QuestionStates(bert), build_gate(small_config.gate)
    with torch.inference_mode():
        states(QUESTIONS)
    gate(states(QUESTIONS)).sum().backward()
    assert gate[0].weight.grad is not None


def test_gate_is_two_linears_around_an_exact_gelu(small_config: HumanOmniConfig) -> None:
    gate = build_gate(small_config.gate).double()
    state = torch.randn(2, small_config.gate.width, dtype=torch.float64)
    first, last = gate[0], gate[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    hidden = state @ first.weight.T + first.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(gate(state), hidden @ last.weight.T + last.bias, rtol=0, atol=1e-12)
    assert last.out_features == 3
