import json
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_refused, run

import bench
from core.config import build_config, read_values, resolve
from core.corpus import open_corpus
from core.dataset import TokenDataset, batches
from core.preflight import check_run
from core.trainer import Trainer
from lib.cli import UserError
from lib.device import peak_flops

# A peer of our own: nanoGPT's constructor and calls around a bigram model. It talks, as peers do.
PEER = """
import torch
from dataclasses import dataclass

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.lm_head = torch.nn.Linear(config.n_embd, config.vocab_size, bias=False)
        print("number of parameters: some")

    def forward(self, idx, targets=None):
        logits = self.lm_head(self.wte(idx))
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
"""


@pytest.fixture
def peer(tmp_path):
    path = tmp_path / "model.py"
    path.write_text(PEER)
    return path


def table_rows(text):
    """{label: figures} of the table in a script's output."""
    return {cells[0]: cells[1:] for cells in (re.split(r"  +", line) for line in text.splitlines())}


def trainer_and_batches(tiny_args):
    cfg = check_run(*read_values([*tiny_args, "--gradient_accumulation_steps=2", "--dropout=0.1"]))
    corpus = open_corpus(cfg.dataset, cfg.data_dir)
    data = TokenDataset(corpus.train, cfg.block_size)
    cfg = resolve(cfg, len(data))
    return Trainer(cfg, corpus.tokenizer.vocab_size), batches(data, cfg, 0)


def test_json_beside_a_peer(tiny_args, tmp_path, peer):
    process = run("bench.py", *tiny_args, "--gradient_accumulation_steps=2", "--steps=6", "--warmup=2",
                  "--decode_tokens=5", "--peer", peer, "--json", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result["tokens_per_step"] == 2 * 4 * 32
    assert set(result["runs"]) == {"ours", "peer"}
    for metrics in result["runs"].values():
        ms, rate = metrics["ms_per_step"], metrics["tokens_per_second"]
        assert 0 < ms["low"] <= ms["median"] <= ms["high"]
        assert rate["median"] * ms["median"] == pytest.approx(1000 * result["tokens_per_step"])
        assert sum(metrics["share"].values()) == pytest.approx(1)
        assert set(metrics["share"]) == {"data", "forward", "backward", "optimizer"}
        assert all(share > 0 for share in metrics["share"].values())
        assert metrics["dtype"] == "float32" and metrics["compiled"] is False
        assert 0 < metrics["mfu"] < 1 and metrics["peak_flops"] > 1e9
    ours, beside = result["runs"]["ours"], result["runs"]["peer"]
    assert ours["memory_bandwidth"] > 1e9 and ours["decode_bandwidth_share"] > 0
    assert beside["memory_bandwidth"] is beside["decode_bandwidth_share"] is None
    assert ours["peak_memory_bytes"] > 50e6 and beside["peak_memory_bytes"] is None
    assert ours["decode_tokens_per_second"]["median"] > 0 and beside["decode_tokens_per_second"] is None
    assert result["tokenize_mb_per_second"]["low"] > 0
    assert 0 < result["speedup"]["step"]["low"] <= result["speedup"]["step"]["median"]
    assert result["speedup"]["decode"] is None
    assert not any((tmp_path / name).exists() for name in ("checkpoints", "runs"))


def test_table(tiny_args, peer, capsys):
    assert bench.main([*tiny_args, "--steps=2", "--warmup=2", "--decode_tokens=2", f"--peer={peer}"]) == 0
    rows = table_rows(capsys.readouterr().out)
    assert rows[""] == ["ours", "peer"]
    assert rows["dtype"] == ["float32, not compiled"] * 2
    assert rows["peak RSS of the process"][1] == rows["decode tokens/s"][1] == "n/a"
    shares = [float(rows[f"time in {phase}"][0].rstrip("%")) for phase in bench.PHASES]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert re.fullmatch(r"[\d.]+ \([\d.]+ to [\d.]+\)", rows["step, peer's time / ours"][0])


def test_the_table_is_named_after_the_config():
    for argv, name in ((["configs/quickstart.py"], "quickstart"), (["--dataset=mine"], "mine"), (["gpt2"], "gpt2"),
                       (["gpt2", "--run_name=x"], "x")):
        assert bench.read_run(argv)[0]["run_name"] == name


def test_gpt2_size_on_random_tokens(capsys):
    assert bench.main(["gpt2", "--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=16", "--batch_size=1",
                       "--steps=1", "--warmup=2", "--decode_tokens=0", "--device=cpu", "--dtype=float32"]) == 0
    out = capsys.readouterr().out
    assert "50,257 symbols; 1 x 1 sequence of 16 = 16 tokens a step" in out
    rows = table_rows(out)
    assert rows["parameters"] == [f"{50304 * 8 + 12 * 8 * 8 + 13 * 8 + 2 * 8:,}"]
    assert rows["tokenize MB/s"] == rows["decode tokens/s"] == ["n/a"]


def test_phase_marks_separate_the_work(tiny_args, monkeypatch):
    """When a phase's end is marked its work is done, the next one's not begun."""
    trainer, steps = trainer_and_batches(tiny_args)
    ours, states = bench.Ours(trainer, steps), []
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    mark = bench.Contender.mark

    def look(contender, phase):
        grads = [p.grad for p in trainer.model.parameters()]
        changed = any(not torch.equal(p, old) for p, old in zip(trainer.model.parameters(), weights))
        first = float(grads[0].norm()) if all(grad is not None for grad in grads) else None
        states.append((phase, first, changed))
        mark(contender, phase)

    monkeypatch.setattr(bench.Contender, "mark", look)
    [seconds] = ours.run_steps(1)
    assert [phase for phase, _, _ in states] == [None, *["data", "forward", "backward"] * 2, "optimizer"]
    one, two = states[3][1], states[6][1]
    assert [grad for _, grad, _ in states] == [None, None, None, one, one, one, two, None]
    assert one and two and one != two
    assert [changed for _, _, changed in states] == [False] * 7 + [True]
    assert set(seconds) == set(bench.PHASES)


def test_the_timed_step_is_the_training_step(tiny_args):
    (timed, steps), (plain, same_steps) = trainer_and_batches(tiny_args), trainer_and_batches(tiny_args)
    bench.Ours(timed, steps).run_steps(3)
    for _, batch in zip(range(3), same_steps):
        plain.step(batch)
    weights = [trainer.model.state_dict() for trainer in (timed, plain)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("is_tied", ["true", "false"])
def test_bytes_that_decoding_reads(tiny_args, is_tied):
    """Every matrix once (an embedding that is not the output layer too gives a row only), and half the cache."""
    ours = bench.Ours(*trainer_and_batches([*tiny_args, f"--tie_weights={is_tied}"]))
    weights = sum(p.numel() for name, p in ours.model.named_parameters()
                  if "wpe" not in name and (is_tied == "true" or "wte" not in name))
    assert ours.bytes_per_token(20) == 4 * weights + 2 * 2 * 32 * 4 * 10
    assert ours.bytes_per_token(1000) == 4 * weights + 2 * 2 * 32 * 4 * 16


def test_metrics_of_known_times(monkeypatch):
    """Three steps of 1, 2 and 4 s on a card: rates, shares, ratio by hand; no MFU where the card is unknown."""
    def contender(*seconds):
        steps = [{"data": s / 8, "forward": s / 4, "backward": s / 2, "optimizer": s / 8} for s in seconds]
        return SimpleNamespace(turns=[[step] for step in steps], device=torch.device("cuda"), dtype=torch.bfloat16,
                               compiled=True, n_params=10, flops_per_token=989e9, decode_seconds=[2.0, 4.0, 8.0],
                               peak_memory=2**30, bytes_per_token=lambda n_tokens: 10**9)

    cfg, _ = build_config(dict(batch_size=5, gradient_accumulation_steps=2, block_size=100))
    ours, peer = contender(1.0, 2.0, 4.0), contender(3.0, 3.0, 4.0)
    monkeypatch.setattr(bench, "memory_bandwidth", lambda device: 8e9)
    for card, mfu in (("NVIDIA H100 80GB HBM3", 0.5), ("NVIDIA X1 Unheard-of", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, card=card: card)
        metrics = bench.metrics(ours, cfg, 16)
        assert metrics["mfu"] == mfu
        rows = dict(bench.rows_of(metrics, "memory"))
        assert rows["MFU"] == ("n/a" if mfu is None else "50.0% of 989 TFLOP/s")
    assert metrics["ms_per_step"] == {"median": 2000, "low": 1500, "high": 3000}
    assert metrics["tokens_per_second"]["median"] == 500
    assert metrics["share"] == {"data": 1 / 8, "forward": 1 / 4, "backward": 1 / 2, "optimizer": 1 / 8}
    assert metrics["decode_tokens_per_second"]["median"] == 4
    assert rows["memory"] == "1,024 MiB" and rows["bandwidth in decoding"] == "50.0% of 8 GB/s"
    assert bench.speedups(ours, peer)["step"] == {"median": 1.5, "low": 1.25, "high": 2.25}


@pytest.mark.parametrize("card, teraflops", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-40GB", 312), ("Tesla T4", 65),
    ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA T400 4GB", None), ("NVIDIA L40", None), ("NVIDIA A10G", None),
    ("NVIDIA H100 NVL", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GH200 480GB", None),
])
def test_only_known_cards_have_a_peak(monkeypatch, card, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    assert peak_flops(torch.device("cuda")) == (teraflops and teraflops * 1e12)


def test_missing_peer_is_refused(tmp_path):
    process = run("bench.py", "--peer", "nothing.py", cwd=tmp_path)
    assert_refused(process, "nothing.py")
    assert process.stdout == "" and process.stderr.count("\n") == 1


@pytest.mark.parametrize("source, words", [
    ("class GPTConfig: pass", "no GPT:"), ("x = 1", "no GPT and no GPTConfig"), ("def (", "SyntaxError"),
    ("import no_such_module", "ModuleNotFoundError"), ("raise SystemExit(0)", "SystemExit"),
])
def test_invalid_peers_are_refused(tmp_path, source, words):
    path = tmp_path / "model.py"
    path.write_text(source)
    with pytest.raises(UserError, match=words) as error:
        bench.load_peer(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_peer_with_another_constructor_is_refused(tiny_args, tmp_path, peer):
    peer.write_text(PEER.replace("    dropout: float\n", ""))
    with pytest.raises(UserError, match="dropout"):
        bench.main([*tiny_args, "--warmup=2", f"--peer={peer}"])


@pytest.mark.parametrize("argv, words", [
    (["gpt3"], "gpt2-medium"), (["--stps=3"], "--stps"), (["--peer_compile"], "--peer"),
    (["gpt2", "--n_head=7"], "768"),
])
def test_bad_command_lines_are_refused(argv, words):
    with pytest.raises(UserError, match=words):
        bench.main(argv)
