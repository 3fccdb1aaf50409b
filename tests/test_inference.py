import numpy as np
import pytest
import torch
from helpers import CPU, FAMILIES, make_model
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from core.inference import (
    choose_tokens,
    generate,
    make_cache,
    next_logits,
    prepare_for_inference,
    stream,
    window_start,
)
from lib.kernels import PackedLinear


def without_cache(model, tokens, n_new):
    """Greedy continuation that reads the whole window again for every token."""
    for _ in range(n_new):
        with torch.no_grad():
            logits = model(tokens[:, window_start(tokens.size(1), model.config.block_size) :])[0]
        tokens = torch.cat((tokens, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return tokens


@pytest.mark.parametrize("pos", ["learned", "sinusoidal", "rope"])
@pytest.mark.parametrize("family", ["gpt2", "modern"])
def test_greedy_text_with_cache_equals_without(family, pos):
    model = make_model(family, pos=pos, block_size=64)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # near initialization a text soon repeats itself
    idx = torch.randint(50, (2, 7))
    expected = without_cache(model, idx, 600)
    assert len(expected[0].unique()) > 5
    assert torch.equal(generate(model, idx, 600, temperature=0), expected)


def test_every_token_is_drawn_with_the_next_random_number():
    """Past the numbers that are drawn at once."""
    model, generator = make_model(block_size=256), np.random.default_rng(5)
    expected = idx = torch.randint(50, (1, 3))
    for _ in range(150):
        logits = model(expected)[0][:, -1].detach()
        new = choose_tokens(logits, torch.tensor([generator.random()], dtype=torch.float64), temperature=1.5)
        expected = torch.cat((expected, new[:, None]), dim=1)
    assert torch.equal(generate(model, idx, 150, seed=5, temperature=1.5), expected)


def test_window_is_the_whole_text_and_then_at_least_half_a_context():
    assert [window_start(n, block_size=16) for n in (1, 16, 17, 24, 25, 32, 33)] == [0, 0, 8, 8, 16, 16, 24]
    assert [window_start(n, block_size=1) for n in (1, 2, 3)] == [0, 1, 2]
    assert all(0 < n - window_start(n, block_size=5) <= 5 for n in range(1, 40))


@pytest.mark.parametrize("length", [15, 16, 17, 100])
def test_a_prompt_of_any_length_is_continued(length):
    model = make_model(block_size=16)
    idx = torch.randint(50, (1, length))
    assert torch.equal(generate(model, idx, 20, temperature=0), without_cache(model, idx, 20))
    assert torch.equal(generate(model, idx, 0), idx)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_does_not_depend_on_the_batch(family, prepared):
    model = make_model(family)
    if prepared:
        prepare_for_inference(model, CPU, torch.bfloat16)
    idx = torch.randint(50, (1, 5))
    together = generate(model, idx, 40, num_samples=4, seed=7, temperature=2.0)
    alone = [generate(model, idx, 40, seed=7 + i, temperature=2.0)[0] for i in range(4)]
    assert torch.equal(together, torch.stack(alone))
    assert len({tuple(row.tolist()) for row in together}) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_gives_the_same_text(family):
    """The graph itself needs CUDA; its cache, whose shapes never change, does not."""
    model = make_model(family)
    idx = torch.randint(50, (2, 5))
    options = dict(max_new_tokens=40, num_samples=2, temperature=0.8, repetition_penalty=1.3)
    expected = [generate(model, idx, seed=seed, **options) for seed in range(3)]
    model.decoders = {}
    for seed in range(3):  # the second text is decoded in the first one's buffers
        assert torch.equal(generate(model, idx, seed=seed, **options), expected[seed])
    assert len(model.decoders) == 1
    at_once = zip(*(stream(model, idx, seed=seed, **options) for seed in (0, 1)))  # not in the same buffers
    assert torch.equal(torch.stack([second for _, second in at_once], dim=1), expected[1][:, 5:])


FILTERS = {
    "none": ({}, []),
    "temperature": (dict(temperature=0.7), [TemperatureLogitsWarper(0.7)]),
    "top_k": (dict(top_k=4), [TopKLogitsWarper(4)]),
    "top_k over the vocabulary": (dict(top_k=999), []),
    "top_p": (dict(top_p=0.6), [TopPLogitsWarper(0.6)]),
    "min_p": (dict(min_p=0.2), [MinPLogitsWarper(0.2)]),
    "repetition_penalty": (dict(repetition_penalty=1.5), [RepetitionPenaltyLogitsProcessor(1.5)]),
    "all": (dict(temperature=1.3, top_k=9, top_p=0.8, min_p=0.1, repetition_penalty=1.2),
            [RepetitionPenaltyLogitsProcessor(1.2), TemperatureLogitsWarper(1.3), TopKLogitsWarper(9),
             TopPLogitsWarper(0.8), MinPLogitsWarper(0.1)]),
}


@pytest.mark.parametrize("name", FILTERS)
def test_samples_follow_the_filtered_distribution(name):
    options, processors = FILTERS[name]
    model = make_model(vocab_size=12, tie_weights=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    idx = torch.tensor([[1, 2, 3, 4, 5, 6, 1]])
    logits = model(idx)[0][:, -1].detach()
    assert 1 < logits.std() < 2 and logits[0, 1:7].min() < -0.5 < 0.5 < logits[0, 1:7].max()
    n = 10_000
    expected = n * LogitsProcessorList(processors)(idx, logits).softmax(-1)[0].double().numpy()
    counts = np.bincount(generate(model, idx, 1, num_samples=n, **options)[:, -1], minlength=12)
    assert (counts[expected == 0] == 0).all()
    chi_squared = ((counts - expected) ** 2 / np.maximum(expected, 1e-9))[expected > 0].sum()
    assert chi_squared < 35, (counts, expected)  # at most 11 degrees of freedom: p < 0.0003


def test_uniforms_at_the_ends_choose_tokens_that_are_left():
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 3.0, 2.0]])
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for options in ({}, dict(top_k=3), dict(top_p=0.7), dict(min_p=0.1)):
        chosen = choose_tokens(logits.expand(2, 5), ends, **options).tolist()
        assert 2 not in chosen and (options == {} or 0 not in chosen)


def test_generation_leaves_the_mode_and_the_global_generator_alone():
    model = make_model(dropout=0.5).train()
    before = torch.get_rng_state()
    generate(model, torch.tensor([[1]]), 3)
    assert model.training and torch.equal(torch.get_rng_state(), before)


def test_a_prepared_model_gives_the_same_logits():
    model = make_model()
    idx = torch.randint(50, (1, 16))
    with torch.no_grad():
        expected = model(idx)[0]
        assert torch.allclose(prepare_for_inference(model, CPU, torch.float32)(idx)[0], expected, atol=1e-5)


def test_a_processor_without_the_packed_bfloat16_kernels_computes_without_them(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    model, idx = make_model(), torch.randint(50, (1, 16))
    expected = model(idx)[0].detach()
    prepare_for_inference(model, CPU, torch.bfloat16)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert torch.allclose(model(idx)[0], expected, atol=0.05)


def test_logits_with_a_large_common_offset_keep_their_differences_in_bfloat16():
    """As GPT-2's do, which lie around -100."""
    model = make_model(vocab_size=1030, tie_weights=False, n_embd=64)
    idx = torch.randint(1030, (1, 16))
    with torch.no_grad():
        model.lm_head.weight.mul_(10).add_(-4 * model.transformer.ln_f(model.hidden(idx)[0, -1]))
        expected = model(idx)[0][0, -1]
        result = prepare_for_inference(model, CPU, torch.bfloat16)(idx)[0][0, -1]
    assert expected.mean() < -100 and 1 < expected.std() < 10 and result.dtype == torch.float32
    wrong = (result - expected) - (result - expected).mean()
    assert wrong.abs().max() < 0.1 < (expected.bfloat16().float() - expected).abs().max()


def test_padding_of_the_vocabulary_is_never_generated():
    model = make_model(vocab_size=1030)
    with torch.no_grad():
        model.transformer.wte.weight[1030:] = 100.0
    assert generate(model, torch.randint(1030, (3, 16)), 30, num_samples=2, temperature=50.0).max() < 1030


def test_a_cache_takes_a_prompt_and_then_single_tokens_until_it_is_full():
    model = make_model()
    cache, tokens = make_cache(model, 1), torch.zeros(1, 16, dtype=torch.int64)
    with torch.no_grad():
        next_logits(model, tokens[:, :14], cache)
        with pytest.raises(ValueError, match="only an empty cache takes more"):
            next_logits(model, tokens[:, :2], cache)
        for _ in range(2):
            next_logits(model, tokens[:, :1], cache)
        with pytest.raises(ValueError, match=r"16 \+ 1 tokens exceed block_size 16"):
            next_logits(model, tokens[:, :1], cache)
