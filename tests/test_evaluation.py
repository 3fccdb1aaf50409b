import math

import numpy as np
import pytest
import torch
from helpers import CPU, FAMILIES

from core.corpus import pydoc_text
from core.dataset import TokenDataset
from core.evaluation import evaluate, perplexity
from core.tokenizer import CharTokenizer
from model import GPT, GPTConfig


@pytest.mark.parametrize("stride", [16, 5, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_is_predicted_once(family, stride):
    text = pydoc_text(None)[:150] + "é"
    tokenizer = CharTokenizer.from_text(text)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.5,
                          **FAMILIES[family])).train()
    tokens = tokenizer.encode(text).astype(np.uint16)
    dataset = TokenDataset(tokens, 16, stride, tokenizer)
    results = [evaluate(model, dataset, batch_size, CPU) for batch_size in (1, 7, 64)]
    assert model.training
    model.eval()
    nats = []
    for t in range(1, len(tokens)):  # token by token, in the first window that reaches it
        context = tokens[max(0, -(-(t - 16) // stride)) * stride : t].astype(np.int64)
        with torch.no_grad():
            logits = model(torch.from_numpy(context)[None])[0][0, -1]
        nats.append(-torch.log_softmax(logits.double(), -1)[int(tokens[t])].item())
    assert len(nats) == len(text) - 1
    for result in results:
        assert abs(result.loss - np.mean(nats)) < 1e-6
        assert result.perplexity == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)
        assert result.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / len(text[1:].encode()), rel=1e-5)


def test_perplexity_overflows_to_infinity():
    assert perplexity(0.0) == 1 and perplexity(699.0) == math.exp(699) and perplexity(1e4) == math.inf
