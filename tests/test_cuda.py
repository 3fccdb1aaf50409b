"""What only a CUDA card can show: python -m pytest -m cuda (about three minutes). Without a card all of it is skipped.

The scripts run as processes; their checkpoints and outputs are compared.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, assert_refused, run

from core.checkpoint import load_checkpoint, step_checkpoints
from core.config import resolve
from core.corpus import open_corpus
from core.dataset import TokenDataset, batches
from core.evaluation import evaluate
from core.inference import generate, prepare_for_inference
from core.preflight import check_run
from core.trainer import Diverged, Trainer
from lib.device import synchronize
from model import GPT, GPTConfig

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")]

CUDA, EAGER, COMPILED = "--device=cuda", "--compile=false", "--compile=true"
MODERN = ["--norm=rmsnorm", "--mlp=swiglu", "--pos=rope", "--bias=false", "--optimizer=muon"]


@pytest.fixture(scope="module", autouse=True)
def compiler_cache(tmp_path_factory):
    """One cache of compiled kernels for the processes of all these tests."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))


@pytest.fixture(scope="module")
def flags(data_dir):
    """Flags of a small run: two heads of 32, so that every attention kernel can take them."""
    fields = dict(dataset="tiny", data_dir=data_dir, n_layer=2, n_head=2, n_embd=64, block_size=64, batch_size=8,
                  warmup_iters=2, lr_decay_iters=20, log_interval=1, eval_interval=6, checkpoint_interval=6,
                  sample_tokens=8, max_iters=12)
    return [f"--{name}={value}" for name, value in fields.items()]


def trained(folder, flags, *more, name="run", code=0, env=None):
    """Train as a process in `folder`; (the newest checkpoint's content, stdout and stderr)."""
    process = run("train_gpt2.py", *flags, f"--run_name={name}", *more, cwd=folder, env=env)
    assert process.returncode == code, process.stdout + process.stderr
    assert "Traceback" not in process.stderr and "torch.compile failed" not in process.stderr, process.stderr
    return load_checkpoint(step_checkpoints(folder / "checkpoints" / name)[-1]), process.stdout + process.stderr


@pytest.fixture(scope="module")
def runs(flags, tmp_path_factory):
    """runs(device or number format or …): a finished run's (folder, checkpoint, output), made once for each flags."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def of(*more):
        if more not in made:
            name = f"run{len(made)}"
            made[more] = (folder, name, *trained(folder, flags, *more, name=name))
        return made[more]

    return of


def training(data_dir, folder, **fields):
    """(a Trainer of a small model, its batches, the validation data)."""
    base = dict(dataset="tiny", data_dir=str(data_dir), out_dir=str(folder / "checkpoints"), device="cuda",
                log_dir=str(folder / "runs"), n_layer=2, n_head=2, n_embd=64, block_size=64, batch_size=8,
                warmup_iters=0, max_iters=1000, sample_tokens=0, run_name="inside")
    cfg, corpus = check_run(base | fields, []), open_corpus("tiny", data_dir)
    data, val_data = (TokenDataset(tokens, cfg.block_size, tokenizer=corpus.tokenizer)
                      for tokens in (corpus.train, corpus.val))
    cfg = resolve(cfg, len(data))
    return Trainer(cfg, corpus.tokenizer.vocab_size), batches(data, cfg, 0), val_data


def tensors_in(tree, path=()):
    """{path: tensor} of every tensor in nested dicts, on the CPU."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= tensors_in(value, (*path, key))
        elif isinstance(value, torch.Tensor):
            found[(*path, key)] = value.cpu()
    return found


def assert_same_bits(a, b):
    a, b = (tensors_in({key: content[key] for key in ("model_state_dict", "optimizer_state_dict")})
            for content in (a, b))
    assert a.keys() == b.keys() and len(a) > 0
    assert [path for path in a if not torch.equal(a[path], b[path])] == []


def difference(a, b):
    """‖weights of a − weights of b‖ / ‖weights of b‖ of two checkpoints."""
    a, b = (torch.cat([value.double().flatten() for value in tensors_in(c["model_state_dict"]).values()])
            for c in (a, b))
    return ((a - b).norm() / b.norm()).item()


def losses(output):
    """The losses of the progress lines, and the last validation loss."""
    found = re.findall(r"\| loss ([\d.]+)", output) + re.findall(r"val loss ([\d.]+) \|", output)[-1:]
    return [float(number) for number in found]


# Training

@pytest.mark.parametrize("family", [[], MODERN], ids=["gpt2", "modern"])
def test_float32_equals_the_cpu(runs, family):
    """Within what TF32 products, 10 bits, leave."""
    _, _, ours, out = runs(CUDA, EAGER, "--dtype=float32", "--max_iters=1", *family)
    _, _, cpu, on_cpu = runs("--device=cpu", "--dtype=float32", "--max_iters=1", *family)
    assert losses(out) == pytest.approx(losses(on_cpu), abs=2e-3)
    assert difference(ours, cpu) < 0.005
    gradients = [{path: value for path, value in tensors_in(c["optimizer_state_dict"]).items()
                  if path[-1] in ("exp_avg", "momentum_buffer")} for c in (ours, cpu)]
    for path, value in gradients[1].items():
        assert (gradients[0][path] - value).norm() < 0.01 * value.norm() + 1e-8, path


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", [[], MODERN], ids=["gpt2", "modern"])
def test_16_bits_train_as_32_do(runs, dtype, family):
    _, _, _, expected = runs(CUDA, EAGER, "--dtype=float32", *family)
    _, _, state, out = runs(CUDA, EAGER, f"--dtype={dtype}", *family)
    assert losses(out)[-1] < losses(out)[0] - 0.2  # it learns
    assert losses(out) == pytest.approx(losses(expected), abs=0.08)
    assert state["model_state_dict"]["lm_head.weight"].dtype == torch.float32


@pytest.mark.parametrize("family", [[], MODERN], ids=["gpt2", "modern"])
def test_compiled_equals_eager(runs, family):
    _, _, eager, eager_out = runs(CUDA, EAGER, "--dtype=bfloat16", *family)
    _, _, compiled, out = runs(CUDA, COMPILED, "--dtype=bfloat16", *family)
    assert "; compiled" in out and "not compiled" in eager_out
    assert losses(out) == pytest.approx(losses(eager_out), abs=0.05)
    assert difference(compiled, eager) < 0.1


def test_compiled_loss_of_a_large_vocabulary_equals_eager(data_dir):
    """The form for compilers, and in several chunks, the last one smaller."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=1030, block_size=64, n_layer=1, n_head=2, n_embd=64)
    model = GPT(config).cuda()
    x, y = torch.randint(1030, (2, 9, 64), device="cuda")
    y[2, 5:] = -1
    results = []
    for forward in (model, torch.compile(model, dynamic=False)):
        with pytest.MonkeyPatch.context() as patch, torch.autocast("cuda", torch.bfloat16):
            patch.setattr("lib.kernels.MAX_FUSED_LOGITS", 120 * config.padded_vocab_size)
            loss = forward(x, y)[1]
        model.zero_grad()
        loss.backward()
        results.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
    (eager, eager_gradients), (compiled, gradients) = results
    assert compiled == pytest.approx(eager, rel=1e-3)
    assert all((a - b).norm() < 0.03 * b.norm() for a, b in zip(gradients, eager_gradients))
    torch.compiler.reset()


@pytest.mark.parametrize("more", [
    [EAGER, "--dropout=0.1", "--gradient_accumulation_steps=2"], [COMPILED, "--dropout=0.1"], [COMPILED, *MODERN],
], ids=["eager", "compiled", "compiled-muon"])
def test_resumed_runs_equal_uninterrupted_ones(runs, flags, more):
    folder, name, straight, _ = runs(CUDA, "--dtype=bfloat16", *more)
    name = f"parts-of-{name}"
    trained(folder, flags, CUDA, "--dtype=bfloat16", *more, "--max_iters=6", name=name)
    parts, out = trained(folder, flags, CUDA, "--dtype=bfloat16", *more, "--resume", name=name)
    assert "at step 6" in out
    assert_same_bits(parts, straight)


@pytest.mark.parametrize("first, second", [("cpu", "cuda"), ("cuda", "cpu")])
@pytest.mark.parametrize("family", [[], MODERN], ids=["gpt2", "modern"])
def test_a_run_is_resumed_on_another_device(runs, flags, first, second, family):
    folder, name, whole, whole_out = runs(CUDA, EAGER, "--dtype=float32", *family)
    name = f"{first}-{name}"
    trained(folder, flags, EAGER, "--dtype=float32", *family, f"--device={first}", "--max_iters=6", name=name)
    state, out = trained(folder, flags, EAGER, "--dtype=float32", *family, f"--device={second}", "--resume", name=name)
    assert f"device {first} -> {second}" in out
    assert losses(out) == pytest.approx(losses(whole_out)[6:], abs=0.02)
    assert difference(state, whole) < 0.05


@pytest.mark.parametrize("more", [[EAGER, "--dtype=bfloat16"], [COMPILED, "--dtype=bfloat16"],
                                  [EAGER, "--dtype=bfloat16", *MODERN]], ids=["eager", "compiled", "muon"])
def test_divergence_ends_with_3_and_saves_nothing_bad(flags, tmp_path, more):
    process = run("train_gpt2.py", *flags, CUDA, *more, "--learning_rate=1e38", "--grad_clip=0", "--run_name=bad",
                  cwd=tmp_path)
    assert process.returncode == 3, process.stdout + process.stderr
    assert "diverged at step" in process.stderr and "Traceback" not in process.stderr
    for path in (tmp_path / "checkpoints/bad").glob("*.pt*"):
        assert all(value.isfinite().all() for value in load_checkpoint(path)["model_state_dict"].values())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gradient_that_is_not_finite_is_noticed(data_dir, tmp_path, optimizer):
    trainer, steps, _ = training(data_dir, tmp_path, compile="false", optimizer=optimizer, dtype="bfloat16")
    trainer.step(next(steps))
    trainer.check_finite()
    trainer.model.transformer.h[0].mlp.c_fc.weight.register_hook(lambda gradient: gradient * math.inf)
    trainer.step(next(steps))
    trainer.step(next(steps))
    with pytest.raises(Diverged, match="diverged at step 2"):
        trainer.check_finite()


def test_sigterm_saves(flags, tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_gpt2.py"), *flags, CUDA, COMPILED, "--run_name=long", "--max_iters=100000",
         "--eval_interval=100000", "--checkpoint_interval=100000", "--log_interval=5"],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in process.stdout:
        if re.search(r"step 10/", line):
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate(timeout=100)
    assert process.returncode == 143, err
    assert "--resume" in out and "Traceback" not in err
    (saved,) = step_checkpoints(tmp_path / "checkpoints/long")
    assert load_checkpoint(saved)["step"] >= 10


def test_epochs_are_timed(runs):
    _, _, _, out = runs(CUDA, EAGER, "--dtype=bfloat16", "--max_iters=30")
    assert re.search(r"epoch took [\d.]+", out), out


@pytest.mark.parametrize("compile_", [EAGER, COMPILED])
def test_out_of_memory_is_one_line(flags, tmp_path, compile_):
    process = run("train_gpt2.py", *flags, CUDA, compile_, "--batch_size=1000000", "--n_embd=1024", "--n_layer=8",
                  cwd=tmp_path)
    assert_refused(process, "memory", "batch_size")
    assert "torch.compile failed" not in process.stderr
    assert len([line for line in process.stderr.splitlines() if line.startswith("error:")]) == 1


# What makes a run slow

@pytest.mark.parametrize("more", [dict(compile="false"), dict(compile="true"),
                                  dict(compile="true", optimizer="muon", gradient_accumulation_steps=2, dropout=0.1)],
                         ids=["eager", "compiled", "compiled-muon"])
def test_a_steady_step_never_waits_for_the_card(data_dir, tmp_path, more):
    trainer, steps, _ = training(data_dir, tmp_path, dtype="bfloat16", **more)
    for _ in range(3):
        trainer.step(next(steps))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            trainer.step(next(steps))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.check_finite()
    torch.compiler.reset()


def test_nothing_is_compiled_after_the_start(flags, tmp_path):
    """The start table is printed when the trial is over."""
    process = subprocess.run(
        [sys.executable, str(ROOT / "train_gpt2.py"), *flags, CUDA, COMPILED, "--dtype=bfloat16", "--dropout=0.1",
         "--eval_interval=3", "--gradient_accumulation_steps=2", "--eval_tokens=1000", "--run_name=logs"],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
        env=os.environ | {"TORCH_LOGS": "recompiles,graph_breaks", "PYTHONUNBUFFERED": "1"})
    assert process.returncode == 0, process.stdout
    trial, steps = process.stdout.split("run      logs", 1)
    assert "Graph break" not in process.stdout
    assert trial.count("Recompiling function") <= 1  # evaluation's graph beside training's
    assert "Recompiling" not in steps and steps.count("| val loss") == 4


@pytest.mark.parametrize("compile_", ["false", "true"])
def test_memory_does_not_grow(data_dir, tmp_path, compile_):
    """Over 200 steps and 5 evaluations, allocated and reserved."""
    trainer, steps, val_data = training(data_dir, tmp_path, compile=compile_, dtype="bfloat16")
    held = []
    for step in range(1, 241):
        trainer.step(next(steps))
        if step % 40 == 0:
            trainer.check_finite()
            evaluate(trainer.forward, val_data, trainer.cfg.batch_size, trainer.device, trainer.dtype)
            synchronize(trainer.device)
            held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held[-1] <= held[0], held
    torch.compiler.reset()


# Generating

@pytest.mark.parametrize("pos", ["learned", "sinusoidal", "rope"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_decoding_equals_eager(pos, dtype):
    """Over the context's end, where the window is read again, for several rows and for one."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, block_size=32, n_layer=2, n_head=2, n_embd=64, pos=pos))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # near initialization a text soon repeats itself
    prepare_for_inference(model, torch.device("cuda"), dtype)
    idx = torch.randint(50, (1, 7), device="cuda")
    for rows in (1, 3):
        options = dict(max_new_tokens=100, num_samples=rows, temperature=0.0)
        graphs = [generate(model, idx, **options) for _ in range(2)]  # captured, then replayed
        decoders, model.decoders = model.decoders, None
        eager = generate(model, idx, **options)
        model.decoders = decoders
        if dtype == torch.float32:
            assert torch.equal(graphs[0], eager)
        assert len(eager[0].unique()) > 5 and torch.equal(graphs[0][:, :8], eager[:, :8])
        assert torch.equal(*graphs) and all(decoder.graph for decoder in model.decoders.values())
    drawn = [generate(model, idx, 60, num_samples=2, seed=3, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01,
                      repetition_penalty=1.1) for _ in range(2)]
    assert torch.equal(*drawn) and drawn[0].max() < 50
    assert len(model.decoders) == 3


def test_sampling_from_a_run(runs):
    folder, name, _, _ = runs(CUDA, COMPILED, "--dtype=bfloat16")
    flags = ["--ckpt", f"checkpoints/{name}", "--max_new_tokens=100", "--num_samples=3", "--prompt=def ", "--json"]
    process = run("sample.py", *flags, CUDA, cwd=folder)
    assert process.returncode == 0 and "Traceback" not in process.stderr, process.stderr
    samples = [json.loads(line) for line in process.stdout.splitlines()]
    assert [len(sample["tokens"]) for sample in samples] == [100] * 3
    scores = []
    (folder / "text.txt").write_text("The value of the expression is the value of the statement.\n" * 20)
    for device in ("cuda", "cpu"):
        process = run("sample.py", "--ckpt", f"checkpoints/{name}", "--score=text.txt", "--json", f"--device={device}",
                      cwd=folder)
        assert process.returncode == 0, process.stderr
        scores.append(json.loads(process.stdout)["loss"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_bench(flags, tmp_path):
    process = run("bench.py", *flags, CUDA, "--dtype=bfloat16", "--steps=6", "--decode_tokens=80", "--json",
                  cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    ours = json.loads(process.stdout)["runs"]["ours"]
    assert ours["compiled"] and ours["tokens_per_second"]["median"] > 1000
    assert ours["decode_tokens_per_second"]["median"] > 10 and ours["peak_memory_bytes"] > 2**20
    assert sum(ours["share"].values()) == pytest.approx(1) and 0 < ours["decode_bandwidth_share"] < 1
