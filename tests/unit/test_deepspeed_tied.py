"""Encoders whose embeddings share their weight with the head, as in DeepSpeed's BERT examples."""

import pytest
import torch
from helpers import run_ranks
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from torchrft import deepspeed
from torchrft.parallel.modules import shares_weights

KINDS = {"bert": (BertConfig, BertForMaskedLM), "roberta": (RobertaConfig, RobertaForMaskedLM)}
STEPS, RATE = 3, 1e-2


def model_of(kind):
    config, model = KINDS[kind]
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    made = model(config(vocab_size=24, num_attention_heads=2, **sizes, **no_dropout))
    embedding = made.get_input_embeddings()
    assert made.get_output_embeddings().weight is embedding.weight
    return made


def batches():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 24, (STEPS, 4, 6), generator=generator)


def on_two_ranks(rank):
    return {kind: [train(rank, kind, stage) for stage in (0, 3)] for kind in KINDS}


def train(rank, kind, stage):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": RATE, "weight_decay": 0.0}},
        "zero_optimization": {"stage": stage},
    }
    engine = deepspeed.initialize(model=model_of(kind), config=config)[0]
    losses = []
    for ids in batches():
        mine = ids[2 * rank : 2 * rank + 2]
        loss = engine(input_ids=mine, labels=mine).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    weight = engine.module_state_dict()[weight_name(engine.module)]
    return losses, weight


def weight_name(model):
    return next(n for n, _ in model.named_parameters() if n.endswith("word_embeddings.weight"))


@pytest.fixture(scope="module")
def both_ranks():
    return run_ranks(on_two_ranks, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_tied_encoders_train_as_one_process_does(kind, both_ranks):
    model = model_of(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    expected = []
    for ids in batches():
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        expected.append(float(loss.detach()))
    weight = dict(model.named_parameters())[weight_name(model)].detach()
    first, second = (of_rank[kind] for of_rank in both_ranks)
    for (mine, whole), (others, _) in zip(first, second, strict=True):
        means = torch.tensor([mine, others]).mean(0)
        torch.testing.assert_close(means, torch.tensor(expected), rtol=0, atol=2e-6)
        torch.testing.assert_close(whole, weight, rtol=0, atol=1e-5)


def test_shared_weights_are_seen_from_outside():
    model = model_of("bert")
    assert shares_weights(model, model.bert.embeddings)
    assert shares_weights(model, model.get_output_embeddings())
    assert not shares_weights(model, model.bert.encoder.layer[0])
    assert not shares_weights(model, model)
