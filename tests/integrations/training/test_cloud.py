"""CLoud's joint loss: the critique's tokens as transformers counts them, Bradley–Terry beside."""

from __future__ import annotations

import pytest
import torch
import transformers as t

from rmcore._base.errors import InputError
from rmcore.integrations.training.cloud import CRITIQUE_NLL, CloudLoss, critique_nll
from rmcore.integrations.training.losses import PairBatch, bradley_terry


@pytest.fixture(scope="module")
def language_model():
    torch.manual_seed(0)
    return t.LlamaForCausalLM(
        t.LlamaConfig(
            vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            intermediate_size=24, max_position_embeddings=64,
        )
    )  # fmt: skip


def batch_of(nll, scores):
    columns = {} if nll is None else {CRITIQUE_NLL: nll}
    count = len(scores)
    return PairBatch(
        torch.zeros(count, 2, 4), scores, torch.full((count,), 0.8), torch.zeros(count), "difference", columns
    )


def test_token_loss_is_transformers_own_over_the_critique_alone(language_model):
    ids = torch.randint(0, 60, (3, 12), generator=torch.Generator().manual_seed(1))
    critique = torch.zeros(3, 12, dtype=torch.bool)
    critique[0, 5:9] = True
    critique[1, 1:] = True  # the third has none
    out = language_model(ids, output_hidden_states=True)
    found = critique_nll(out.hidden_states[-1], language_model.lm_head.weight, ids, critique)
    for k in (0, 1):
        labels = ids[k : k + 1].masked_fill(~critique[k : k + 1], -100)
        expected = language_model(ids[k : k + 1], labels=labels).loss
        assert float(found[k].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float(found[2]) == 0
    (gradient,) = torch.autograd.grad(found.sum(), language_model.lm_head.weight)
    assert bool(gradient.isfinite().all())
    assert float(gradient.abs().sum()) > 0


def test_the_joint_loss_adds_the_mean_of_both_critiques_and_trains_both(language_model):
    scores = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    nll = torch.tensor([[2.0, 4.0], [1.0, 1.0]])
    loss = CloudLoss(1.25)(batch_of(nll, scores))
    assert torch.allclose(loss, bradley_terry(batch_of(nll, scores)) + 1.25 * torch.tensor([3.0, 1.0]))
    assert torch.allclose(CloudLoss(0.0)(batch_of(nll, scores)), bradley_terry(batch_of(nll, scores)))
    # A few steps on body, reward head and language head together bring both parts down.
    head = torch.nn.Linear(16, 1)
    optimizer = torch.optim.Adam([*language_model.parameters(), *head.parameters()], lr=1e-2)
    ids = torch.randint(0, 60, (4, 10), generator=torch.Generator().manual_seed(2))
    critique = torch.zeros(4, 10, dtype=torch.bool)
    critique[:, 6:] = True
    told = []
    for _ in range(12):
        states = language_model(ids, output_hidden_states=True).hidden_states[-1]
        nll = critique_nll(states, language_model.lm_head.weight, ids, critique).view(2, 2)
        batch = batch_of(nll, head(states[:, -1]).view(2, 2))
        optimizer.zero_grad()
        torch.autograd.backward(CloudLoss()(batch).mean())
        optimizer.step()
        told.append((float(bradley_terry(batch).mean()), float(nll.mean())))
    assert told[-1][0] < told[0][0]
    assert told[-1][1] < 0.8 * told[0][1]


def test_what_does_not_fit(language_model):
    hidden, ids = torch.zeros(1, 4, 16), torch.zeros(1, 4, dtype=torch.int64)
    critique = torch.tensor([[False, True, True, False]])
    weight = language_model.lm_head.weight
    for given, says in (
        ((hidden[0], weight, ids, critique), r"\(N, T, h\)"),
        ((hidden, weight[:, :3], ids, critique), r"\(V, 16\)"),
        ((hidden, weight, ids, ~critique), "before them"),
    ):
        with pytest.raises(InputError, match=says):
            critique_nll(*given)
    with pytest.raises(InputError, match="no column"):
        CloudLoss()(batch_of(None, torch.zeros(2, 2)))
    with pytest.raises(InputError, match="lm_weight"):
        CloudLoss(-1.0)
