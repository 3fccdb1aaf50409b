import copy
import math

import pytest
import torch
from helpers import FAMILIES, FixedBatch

from core.checkpoint import Progress, Run
from core.config import TrainConfig, resolve
from core.corpus import read_corpus
from core.dataset import TokenDataset
from core.trainer import Diverged, Trainer


@pytest.fixture(scope="module")
def corpus(data_dir):
    return read_corpus(data_dir / "tiny")


@pytest.fixture(scope="module")
def data(corpus):
    """Windows whose last one is padded."""
    windows = TokenDataset(corpus.train, 32)
    assert (windows[-1][1] == -1).any()
    return windows


def config(**fields):
    base = dict(dataset="tiny", device="cpu", n_layer=2, n_head=2, n_embd=32, block_size=32, dtype="float32",
                compile="false", warmup_iters=0, max_iters=20, run_name="r")
    return resolve(TrainConfig(**base | fields), n_windows=338)


@pytest.fixture
def trainer(corpus):
    """A function that makes a trainer with these fields of its config."""
    return lambda **fields: Trainer(config(**fields), corpus.tokenizer.vocab_size)


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same_weights(a, b):
    assert a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_accumulation_equals_one_large_batch_even_with_padding(trainer, data):
    trainers = [trainer(batch_size=b, gradient_accumulation_steps=a, grad_clip=0) for b, a in ((8, 1), (2, 4), (1, 8))]
    x, y = data.windows([0, 1, 2, 3, 4, 5, 6, len(data) - 1])
    assert (y == -1).any()
    with torch.no_grad():
        expected = trainers[0].model(x, y)[1].item()
    for t in trainers:
        loss = t.step(FixedBatch((x, y), 0, t.cfg.batch_size))
        assert loss.item() == pytest.approx(expected, rel=1e-5) and loss.dtype == torch.float32
        assert t.grad_norm.item() == pytest.approx(trainers[0].grad_norm.item(), rel=1e-4)
        for p, q in zip(t.model.parameters(), trainers[0].model.parameters()):
            assert torch.allclose(p, q, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.02)])
def test_a_step_has_the_gradients_of_a_plain_loop(trainer, data, dtype, tolerance):
    t = trainer(batch_size=3, gradient_accumulation_steps=2, grad_clip=0, dtype=dtype, beta1=0.0)
    x, y = data.windows([0, 1, 2, 3, 4, len(data) - 1])
    plain = copy.deepcopy(t.model)
    nats, n_targets = 0, 0
    for tokens, targets in zip(x, y):  # float32, one window at a time, one log-probability at a time
        log_p = torch.log_softmax(plain(tokens[None])[0][0], dim=-1)
        for position, target in enumerate(targets.tolist()):
            if target >= 0:
                nats, n_targets = nats - log_p[position, target], n_targets + 1
    (nats / n_targets).backward()
    assert t.step(FixedBatch((x, y), 0, 3)).item() == pytest.approx(nats.item() / n_targets, rel=tolerance)
    for p, q in zip(t.model.parameters(), plain.parameters()):
        gradient = t.optimizer.state[p]["exp_avg"]  # with beta1 = 0 the first moment is the gradient
        assert (gradient - q.grad).norm() < tolerance * q.grad.norm()


def test_gradients_are_clipped_and_the_norm_is_before_clipping(trainer, data):
    t = trainer(grad_clip=0.01, beta1=0.5)
    t.step(FixedBatch(data.windows(range(4)), 0))
    assert t.grad_norm > 0.1
    # After the first step AdamW's first moment is (1 - beta1) * gradient.
    moments = [state["exp_avg"] for state in t.optimizer.state.values()]
    assert math.sqrt(sum((2 * m).square().sum().item() for m in moments)) == pytest.approx(0.01, rel=1e-3)


def test_dropout_depends_on_seed_and_step_alone(trainer, data):
    batch, states = data.windows(range(4)), []
    for seed, steps, noise in ((3, (5, 6), 0), (3, (5, 6), 9), (3, (5, 7), 0), (4, (5, 6), 0)):
        t = trainer(dropout=0.5, seed=1)
        t.cfg = config(dropout=0.5, seed=seed)
        for step in steps:
            torch.rand(noise)  # what others draw in between
            t.step(FixedBatch(batch, step))
        states.append(weights(t))
    assert_same_weights(states[0], states[1])
    for other in states[2:]:
        assert not torch.equal(states[0]["lm_head.weight"], other["lm_head.weight"])


def test_weights_follow_the_seed(trainer):
    first, same, other = (weights(trainer(seed=seed)) for seed in (1, 1, 2))
    assert_same_weights(first, same)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_the_learning_rate_is_the_schedules(trainer, data):
    t = trainer(warmup_iters=4, learning_rate=1e-3, optimizer="muon")
    t.step(FixedBatch(data.windows(range(2)), 1))
    assert {group["lr"] for group in t.optimizer.param_groups} == {1e-3 * 2 / 5}


def poison(t, what, before):
    """A non-finite weight, loss or gradient from the next step on."""
    weight = t.model.transformer.h[0].mlp.c_fc.weight
    if what == "gradient":
        weight.register_hook(lambda gradient: gradient * math.inf)
    elif what == "loss":
        forward = t.forward
        t.forward = lambda x, y: (None, forward(x, y)[1] * math.nan)
    else:
        before["transformer.h.0.mlp.c_fc.weight"][0, 0] = math.inf
        weight.data[0, 0] = math.inf


POISONS = [("weights", "adamw"), ("loss", "adamw"), ("gradient", "adamw"), ("gradient", "muon")]


@pytest.mark.parametrize("what, optimizer", POISONS)
def test_non_finite_values_never_reach_the_weights_or_the_disk(trainer, corpus, data, tmp_path, what, optimizer):
    t = trainer(optimizer=optimizer, out_dir=str(tmp_path))
    batch = data.windows(range(4))
    t.step(FixedBatch(batch, 0))
    before = weights(t)
    poison(t, what, before)
    with pytest.raises(Diverged, match=r"step 2: loss or gradient .*learning rate 0\.00099"):
        t.step(FixedBatch(batch, 1))
    assert_same_weights(weights(t), before)
    with Run(t.cfg, corpus) as run:
        for name in (None, "best.pt"):
            with pytest.raises(Diverged, match="step 2"):
                run.save(t, Progress(step=2), name)
    assert [path.name for path in t.cfg.run_dir.iterdir()] == [".lock"]


@pytest.mark.parametrize("what, optimizer", POISONS)
def test_asynchronous_steps_stop_at_the_next_check(trainer, corpus, data, tmp_path, what, optimizer):
    t = trainer(optimizer=optimizer, out_dir=str(tmp_path))
    batch = data.windows(range(4))
    t.step(FixedBatch(batch, 0))
    poison(t, what, weights(t))
    check_finite, t.check_finite = t.check_finite, lambda: None  # as on a GPU, where a step does not wait for it
    for step in (1, 2, 3):
        t.step(FixedBatch(batch, step))
    t.check_finite = check_finite
    with pytest.raises(Diverged, match="diverged at step 2: loss or gradient"):
        t.check_finite()
    with Run(t.cfg, corpus) as run, pytest.raises(Diverged, match="diverged at step 2: loss or gradient"):
        run.save(t, Progress(step=4))
    assert [path.name for path in t.cfg.run_dir.iterdir()] == [".lock"]


def test_the_gradient_scaler_looks_for_its_scale_without_diverging(trainer, data):
    t = trainer(dtype="float16")
    assert t.scaler.is_enabled()
    scale, before, batch = t.scaler.get_scale(), weights(t), data.windows(range(4))
    hook = t.model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    t.step(FixedBatch(batch, 0))
    t.check_state(1)
    assert_same_weights(weights(t), before)
    assert t.scaler.get_scale() == scale / 2
    hook.remove()
    t.step(FixedBatch(batch, 1))
    assert not torch.equal(weights(t)["lm_head.weight"], before["lm_head.weight"])
    t.forward = lambda x, y: (None, t.model(x, y)[1] * math.nan)
    with pytest.raises(Diverged, match="step 3"):
        t.step(FixedBatch(batch, 2))


def test_gradients_that_stay_infinite_in_float16_are_a_divergence(trainer, data):
    t = trainer(dtype="float16")
    t.model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    batch = data.windows(range(4))
    with pytest.raises(Diverged, match=r"diverged at step 18: loss or gradient .* or dtype=float32"):
        for step in range(40):  # the scale starts at 2^16 and is halved
            t.step(FixedBatch(batch, step))
    assert t.scaler.get_scale() == 0.5


def test_a_step_can_be_dropped_between_micro_batches(trainer, data):
    batch = FixedBatch(data.windows(range(6)), 0, batch_size=2)
    t, other = trainer(dropout=0.3), trainer(dropout=0.3)
    before, asked = weights(t), []
    assert t.step(batch, lambda n_done: asked.append(n_done) or n_done < 2) is None
    assert asked == [1, 2]
    assert_same_weights(weights(t), before)
    assert t.step(batch, lambda n_done: asked.append(n_done) or True) == other.step(batch)
    assert asked == [1, 2, 1, 2]
    assert_same_weights(weights(t), weights(other))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_restored_state_continues_bit_for_bit(trainer, data, optimizer):
    straight, parts = (trainer(optimizer=optimizer, dropout=0.2, seed=seed) for seed in (1, 2))
    parts.cfg = straight.cfg
    batches = [data.windows(range(4 * step, 4 * step + 4)) for step in range(4)]
    for step in (0, 1):
        straight.step(FixedBatch(batches[step], step))
    parts.load_state_dict(copy.deepcopy(straight.state_dict()) | {"step": 2})
    for step in (2, 3):
        losses = [t.step(FixedBatch(batches[step], step)) for t in (straight, parts)]
        assert torch.equal(*losses)
    assert_same_weights(weights(straight), weights(parts))


def test_a_compiler_that_fails_leaves_the_plain_model(trainer, data, monkeypatch):
    def compiling(message):
        def compile(model, **options):
            def fails(x, y):
                raise RuntimeError(message)

            fails.train = model.train
            return fails

        monkeypatch.setattr(torch, "compile", compile)
        return trainer(compile="true")

    t, plain = compiling("no C++ compiler\nand a long trace"), trainer()
    assert t.compile_error == "no C++ compiler" and t.forward is t.model and t.model.training
    batch = data.windows(range(4))
    assert torch.equal(t.step(FixedBatch(batch, 0)), plain.step(FixedBatch(batch, 0)))
    with pytest.raises(RuntimeError, match="out of memory"):
        compiling("CUDA error: out of memory")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_changes_no_bit_and_keeps_less(trainer, data, family, dropout):
    fields = FAMILIES[family] | dict(dropout=dropout, n_layer=4, n_embd=64)
    plain, checkpointed = trainer(**fields), trainer(activation_checkpointing=True, **fields)
    kept = []
    for t in (plain, checkpointed):
        for step in (0, 1):
            t.step(FixedBatch(data.windows(range(6)), step, batch_size=3))
        kept.append(bytes_kept(t.model, *data.windows(range(6))))
    assert_same_weights(weights(plain), weights(checkpointed))
    assert kept[1] < 0.5 * kept[0]


def bytes_kept(model, x, y):
    """Bytes of the activations that a forward pass keeps for the backward pass."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(x, y)[1]
    assert loss.requires_grad
    return sum(storages.values()) - sum(p.numel() * 4 for p in model.parameters())
