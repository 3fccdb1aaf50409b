"""Weights in Hugging Face's layout: transformers writes the directories and computes what we must compute."""

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from helpers import run
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import train_gpt2
from core import huggingface, pretrained
from core.checkpoint import load_checkpoint, step_checkpoints
from core.corpus import prepare_text, pydoc_text, read_corpus
from core.export import write_pretrained
from core.preflight import check_run
from lib.cli import UserError
from model import GPT2_SIZES, GPTConfig

VOCABULARY = 97
TINY = dict(n_layer=2, n_head=2, n_embd=16, n_positions=24, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0)


def tiny_model(**changes):
    """One of transformers' GPT-2 models in eval mode; its biases and gains are random too."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**TINY | changes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def write_characters(directory, n=VOCABULARY):
    """A tokenizer.json of n characters, as export_hf.py writes it."""
    model = {"type": "WordLevel", "vocab": {chr(32 + i): i for i in range(n)}, "unk_token": "<unk>"}
    (directory / "tokenizer.json").write_text(json.dumps({"model": model}))


@pytest.fixture(scope="module")
def theirs():
    return tiny_model()


@pytest.fixture
def directory(tmp_path, theirs):
    """A directory that transformers wrote, with a character tokenizer."""
    path = tmp_path / "theirs"
    theirs.save_pretrained(path)
    write_characters(path)
    return path


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(name, data_dir="no data"):
    """The model and tokenizer that `name` means; of a directory that has all its files, without a data_dir."""
    return pretrained.load(pretrained.find(name, data_dir))


def load_tokenizer(name, data_dir="no data"):
    """The tokenizer of a directory, whose kind is known before it is loaded."""
    weights = pretrained.find(name, data_dir)
    tokenizer = weights.load_tokenizer()
    assert tokenizer.kind == weights.tokenizer_kind
    return tokenizer


def assert_same_logits(ours, theirs):
    """Equal within 1e-5 over the whole context; the largest difference."""
    x = torch.randint(ours.config.vocab_size, (3, ours.config.block_size), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (ours(x)[0] - theirs(x).logits).abs().max().item()
    assert difference < 1e-5
    return difference


# What transformers writes

@pytest.mark.parametrize("changes", [
    dict(), dict(tie_word_embeddings=False), dict(activation_function="gelu_fast", n_inner=64),
    dict(activation_function="gelu"),
    dict(activation_function="gelu_pytorch_tanh", vocab_size=1500, n_head=4),
], ids=lambda changes: "-".join(changes) or "plain")
def test_a_directory_written_by_transformers_has_the_same_logits(tmp_path, changes):
    model = tiny_model(**changes)
    model.save_pretrained(tmp_path)
    write_characters(tmp_path, model.config.vocab_size)
    ours, tokenizer = load(tmp_path)
    assert_same_logits(ours, model)
    assert tokenizer.vocab_size == ours.config.vocab_size == model.config.vocab_size
    assert ours.config.tie_weights == model.config.tie_word_embeddings
    assert (ours.transformer.wte.weight is ours.lm_head.weight) == ours.config.tie_weights
    assert not ours.transformer.wte.weight[model.config.vocab_size :].any() and not ours.training
    assert all(p.is_contiguous() and p.requires_grad and p.device.type == "cpu" for p in ours.parameters())


def test_shards(directory, theirs):
    (directory / "model.safetensors").unlink()
    theirs.save_pretrained(directory, max_shard_size="10KB")
    assert len(list(directory.glob("model-0*.safetensors"))) > 2 and not (directory / "model.safetensors").exists()
    assert_same_logits(load(directory)[0], theirs)
    next(directory.glob("model-00002*")).unlink()
    with pytest.raises(UserError, match=r"theirs/model-00002-of-0000\d.safetensors is missing"):
        load(directory)
    index = directory / "model.safetensors.index.json"
    for name in ("../x.safetensors", "/x.safetensors", "pytorch_model.bin", "", 3, None):
        edit(index, weight_map={"transformer.wte.weight": name})
        with pytest.raises(UserError, match="not a safetensors file in this directory"):
            load(directory)


def test_a_tensor_that_no_shard_has(directory, theirs):
    (directory / "model.safetensors").unlink()
    theirs.save_pretrained(directory, max_shard_size="10KB")
    name = "transformer.h.1.ln_2.weight"
    file = directory / json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"][name]
    save_file({key: value for key, value in load_file(file).items() if key != name}, file)
    with pytest.raises(UserError) as error:
        load(directory)
    assert str(error.value) == f"{file}: tensor h.1.ln_2.weight is missing"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(tmp_path, dtype):
    model = tiny_model().to(dtype)
    model.save_pretrained(tmp_path)
    write_characters(tmp_path)
    ours, _ = load(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert_same_logits(ours, model.float())


def test_published_files_load(directory, theirs):
    """Names without "transformer.", the causal mask among the tensors, an output layer that is the embedding."""
    tensors = {key.removeprefix("transformer."): value for key, value in theirs.state_dict().items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(2)}
    tensors |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, directory / "model.safetensors")
    assert_same_logits(load(directory)[0], theirs)
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors: tensor lm_head.weight differs from wte.weight, but "):
        load(directory)


def test_export_and_import_round_trip(tmp_path, directory, theirs):
    """theirs -> ours -> theirs: the same bits."""
    write_pretrained(tmp_path / "back", *load(directory), "GPT-2")
    back = GPT2LMHeadModel.from_pretrained(tmp_path / "back").state_dict()
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, back[name]) for name, value in theirs.state_dict().items())


def test_gpt2_tokenizers(tmp_path, downloads, theirs):
    merges = (downloads / "gpt2/vocab.bpe").read_text(encoding="utf-8")
    text = pydoc_text(None)[:5000] + "é☃ 's"
    theirs.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", vocab_size=50257)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/downloads").symlink_to(downloads)
    tokenizers = [load_tokenizer(tmp_path, tmp_path / "data")]
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    shutil.copy(downloads / "gpt2/encoder.json", tmp_path / "vocab.json")
    tokenizers.append(load_tokenizer(tmp_path))
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    shutil.copy(tmp_path / "config.json", tmp_path / "saved")
    tokenizers.append(load_tokenizer(tmp_path / "saved"))
    ids = AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    assert [tokenizer.encode(text).tolist() for tokenizer in tokenizers] == [ids] * 3
    edit(tmp_path / "vocab.json", **{"Ġthe": 1})
    with pytest.raises(UserError, match="numbers its tokens differently"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text(merges[: len(merges) // 2], encoding="utf-8")
    with pytest.raises(UserError, match=r"merges.txt has \d+,\d+ symbols, vocab_size in .*config.json is 50,257"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version\n雪 t\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"merges.txt is damaged"):
        load_tokenizer(tmp_path)


# What does not fit

@pytest.mark.parametrize("changes, words", [
    (dict(model_type="llama"), "model_type=llama"), (dict(activation_function="relu"), "activation_function=relu"),
    (dict(layer_norm_epsilon=1e-6), "layer_norm_epsilon=1e-06"), (dict(n_inner=60), "n_inner=60"),
    (dict(scale_attn_weights=False), "scale_attn_weights=False"), (dict(add_cross_attention=True), "add_cross"),
    (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
    (dict(reorder_and_upcast_attn=True), "reorder_and_upcast_attn=True"), (dict(n_layer="2"), "n_layer must be"),
    (dict(n_layer=0), "n_layer must be"), (dict(n_head=None), "n_head must be"), (dict(n_head=3), "not divisible"),
    (dict(vocab_size=True), "vocab_size must be"), (dict(tie_word_embeddings="no"), "tie_word_embeddings=no"),
    (dict(vocab_size=96), "tokenizer.json has 97 symbols"),
    (dict(n_positions=25), "tensor transformer.wpe.weight has shape [24, 16], its config requires [25, 16]"),
    (dict(n_layer=3), "tensor h.2.ln_1.weight is missing"),
    (dict(n_layer=1), "tensor transformer.h.1.attn.c_attn.bias has no place"),
    (dict(tie_word_embeddings=False), "tensor lm_head.weight is missing"),
])
def test_configs_that_do_not_fit_are_refused_by_name(directory, changes, words):
    edit(directory / "config.json", **changes)
    with pytest.raises(UserError) as error:
        load(directory)
    file = "model.safetensors" if "tensor " in words else "config.json"
    assert words in str(error.value) and f"{directory}/{file}" in str(error.value)
    assert len(error.value.problems) <= huggingface.MAX_PROBLEMS + 1


def without(tensors, name):
    del tensors[name]


def replace(tensors, name, value):
    tensors[name] = value


@pytest.mark.parametrize("change, words", [
    (lambda t: without(t, "transformer.ln_f.bias"), "tensor ln_f.bias is missing"),
    (lambda t: replace(t, "transformer.h.0.x", torch.ones(2)), "tensor transformer.h.0.x has no place"),
    (lambda t: replace(t, "transformer.h.0.mlp.c_fc.weight", torch.ones(64, 16)),
     "tensor transformer.h.0.mlp.c_fc.weight has shape [64, 16], its config requires [16, 64]"),
    (lambda t: replace(t, "transformer.wte.weight", torch.ones(98, 16)),
     "tensor transformer.wte.weight has shape [98, 16], its config requires [97, 16]"),
    (lambda t: replace(t, "transformer.ln_f.bias", torch.ones(16, dtype=torch.int8)), "is of type I8"),
    (lambda t: replace(t, "transformer.ln_f.bias", torch.full((16,), torch.nan)), "ln_f.bias holds values"),
])
def test_tensors_that_do_not_fit_are_refused_by_name(directory, change, words):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UserError) as error:
        load(directory)
    assert str(error.value).startswith(f"{directory}/model.safetensors: ") and words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damaged_files(directory, file):
    whole = (directory / file).read_bytes().strip()
    for content in (whole[:-1], whole[: len(whole) // 2], whole[:4], b"", b"[1]", b"\xff" * 20, b"[" * 100_000):
        (directory / file).write_bytes(content)
        with pytest.raises(UserError, match=file) as error:
            load(directory)
        assert len(error.value.problems) == 1 and "\n" not in str(error.value)


@pytest.mark.parametrize("model", [
    None, [], {"vocab": {"a": 0}}, {"type": "BPE"}, {"type": "BPE", "vocab": ["a"], "merges": []},
    {"type": "BPE", "vocab": {}, "merges": [3]}, {"type": "BPE", "vocab": {}, "merges": None},
    {"type": "WordLevel", "vocab": {"a": 1, "b": "c"}}, {"type": "WordLevel", "vocab": {"ab": 0}},
    {"type": "Unigram", "vocab": {}},
])
def test_malformed_tokenizers_are_refused(directory, model):
    (directory / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(UserError, match=r"tokenizer.json") as error:
        load(directory)
    assert len(error.value.problems) == 1 and "\n" not in str(error.value)


def test_names_that_are_not_models_are_refused(tmp_path, directory):
    assert huggingface.is_model("gpt2-xl") and huggingface.is_model(directory) and not huggingface.is_model(tmp_path)
    for name in (tmp_path, "nosuch", "a\0b", "x" * 5000):
        with pytest.raises(UserError, match="is neither one of gpt2, gpt2-medium"):
            load(name)
    with pytest.raises(UserError, match=r"config\.json is damaged, or not a checkpoint"):
        load(directory / "config.json")
    with pytest.raises(UserError, match=r"did you mean gpt2-large\?"):
        load("gpt-large")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no model.safetensors, and pytorch_model.bin is a pickle"):
        load(directory)


# A hub

class Hub(BaseHTTPRequestHandler):
    """Answers like huggingface.co for a large file: a redirect whose headers report the sha256."""

    def do_HEAD(self):
        self.answer(send=False)

    def do_GET(self):
        self.answer(send=True)

    def answer(self, send):
        server = self.server
        server.requests.append((self.command, self.path))
        directory, file = self.path.rsplit("/", 1)
        body = server.files.get(file)
        if body is None:
            return self.send_error(404)
        stored = directory == "/cdn"
        self.send_response(200 if stored else 302)
        if stored:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.send_header("Location", f"http://localhost:{server.server_port}/cdn/{file}")
            self.send_header("X-Linked-Etag", f'"{server.sha256 or hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Linked-Size", str(len(body)))
            self.send_header("Content-Length", "0")
        self.end_headers()
        if send and stored:
            self.wfile.write(server.harm(body))

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(directory, tmp_path, monkeypatch):
    """A server of the directory's weights as gpt2, with no sha256 known but the one it reports."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.sha256, server.harm = [], None, lambda body: body
    server.files = {"model.safetensors": (directory / "model.safetensors").read_bytes()}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setitem(huggingface.PUBLISHED, "gpt2", ("abc123", None))
    monkeypatch.setitem(GPT2_SIZES, "gpt2", dict(n_layer=2, n_head=2, n_embd=16, block_size=24, vocab_size=VOCABULARY))
    server.store = tmp_path / "data/downloads/huggingface/gpt2"
    server.store.mkdir(parents=True)
    shutil.copy(directory / "tokenizer.json", server.store)  # the published ones have GPT-2's
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def names_in(directory):
    return {path.name for path in directory.iterdir()} - {".lock", "tokenizer.json"}


def test_a_published_model_is_downloaded_once(hub, tmp_path, theirs, monkeypatch):
    for _ in range(2):
        assert_same_logits(load("gpt2", tmp_path / "data")[0], theirs)
    weights = "/openai-community/gpt2/resolve/abc123/model.safetensors"
    assert hub.requests == [("HEAD", weights), ("GET", weights), ("GET", "/cdn/model.safetensors")]
    assert names_in(hub.store) == {"model.safetensors"}
    sha256 = hashlib.sha256(hub.files["model.safetensors"]).hexdigest()
    monkeypatch.setitem(huggingface.PUBLISHED, "gpt2", ("abc123", sha256))
    load("gpt2", tmp_path / "data")
    (hub.store / "model.safetensors").write_bytes(hub.files["model.safetensors"][:-1])  # cut short
    with pytest.raises(UserError, match=r"model.safetensors is not the expected file"):
        load("gpt2", tmp_path / "data")
    monkeypatch.setitem(huggingface.PUBLISHED, "gpt2", ("abc123", None))
    with pytest.raises(UserError, match=r"model.safetensors is truncated, damaged or .*remove it and fetch it again"):
        load("gpt2", tmp_path / "data")
    assert len(hub.requests) == 3


@pytest.mark.parametrize("harm, words", [
    ("cut", "ChunkedEncodingError"), ("longer", "wrong hash"), ("flipped", "wrong hash"), ("absent", "404"),
    ("pinned", "wrong hash"), ("no hash", "the server reports no hash"),
])
def test_wrong_downloads_are_not_kept(hub, tmp_path, monkeypatch, harm, words):
    whole = hub.files["model.safetensors"]
    if harm == "cut":
        hub.harm = lambda body: body[: len(body) // 2]
    elif harm == "absent":
        del hub.files["model.safetensors"]
    elif harm == "no hash":
        hub.sha256 = "none"
    elif harm == "pinned":  # the server reports the hash of what it sends, but that is not what we know
        monkeypatch.setitem(huggingface.PUBLISHED, "gpt2", ("abc123", "0" * 64))
    else:
        hub.sha256 = hashlib.sha256(whole).hexdigest()
        hub.files["model.safetensors"] = whole + b"x" if harm == "longer" else whole[:-1] + bytes([whole[-1] ^ 1])
    with pytest.raises(UserError) as error:
        load("gpt2", tmp_path / "data")
    assert words in str(error.value) and "by hand" in str(error.value) and "\n" not in str(error.value)
    assert names_in(hub.store) == set()


def test_without_a_network(tmp_path, monkeypatch):
    """A published model is found, but its weights are not fetched."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    weights = pretrained.find("gpt2-large", tmp_path)
    assert weights.config == GPTConfig(n_layer=36, n_head=20, n_embd=1280, vocab_size=50257, block_size=1024)
    assert weights.tokenizer_kind == "gpt2" and list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"by hand and put it at .*downloads/huggingface/gpt2-large/model.safetensors"):
        weights.load_state()


# Fine-tuning

@pytest.fixture(scope="module")
def bpe_data(tmp_path_factory, downloads):
    """A data directory with `bpe` (GPT-2's tokenizer), `letters`, and transformers' `pretrained`, which fits `bpe`."""
    data = tmp_path_factory.mktemp("bpe")
    (data / "downloads").symlink_to(downloads)
    prepare_text(pydoc_text(None)[:12_000], "bpe", "gpt2", data)
    prepare_text(pydoc_text(None)[:4_000], "letters", "char", data)
    tiny_model(n_layer=1, n_embd=8, vocab_size=50257).save_pretrained(data / "pretrained")
    return data


def flags(data, **changes):
    fields = dict(dataset="bpe", data_dir=data, init_from="pretrained", dropout=0.1, batch_size=4, max_iters=6,
                  warmup_iters=2, checkpoint_interval=3, eval_interval=6, sample_tokens=4, run_name="ft",
                  dtype="float32", device="cpu")
    return [f"--{name}={value}" for name, value in (fields | changes).items()]


def test_fine_tuning_continues_without_the_weights_it_started_from(bpe_data, tmp_path, monkeypatch, capsys):
    shutil.copytree(bpe_data / "pretrained", tmp_path / "pretrained")
    monkeypatch.chdir(tmp_path)
    assert train_gpt2.main(flags(bpe_data, lr_decay_iters=6, max_iters=3)) == 0
    out = capsys.readouterr().out
    assert "weights from pretrained" in out and "1 layer, 2 heads, 8 wide, context 24" in out
    assert train_gpt2.main(flags(bpe_data, run_name="straight", lr_decay_iters=6)) == 0
    shutil.rmtree(tmp_path / "pretrained")
    resumed = run("train_gpt2.py", *flags(bpe_data, lr_decay_iters=6), "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from checkpoints/ft/step_00000003.pt" in resumed.stdout
    states = [load_checkpoint(step_checkpoints(tmp_path / "checkpoints" / name)[-1]) for name in ("ft", "straight")]
    assert [state["step"] for state in states] == [6, 6]
    assert all(torch.equal(value, states[1]["model_state_dict"][name])
               for name, value in states[0]["model_state_dict"].items())
    assert states[0]["config"]["n_embd"] == 8 and states[0]["config"]["init_from"] == "pretrained"
    with pytest.raises(UserError, match=r"init_from is 'pretrained' in .* and None now: resume with --init_from=pret"):
        train_gpt2.main([*flags(bpe_data, init_from="none", n_layer=1, n_embd=8, n_head=2, block_size=24), "--resume"])


def test_training_starts_from_the_weights(bpe_data, tmp_path, monkeypatch, capsys):
    """With a learning rate of 0 they stay as they are, but for the shorter context."""
    monkeypatch.chdir(bpe_data)
    model, _ = train_gpt2.train_model(init_from="pretrained", data_dir=str(bpe_data), dataset="bpe", block_size=16,
                                      learning_rate=0, max_iters=1, sample_tokens=0, out_dir=str(tmp_path / "c"),
                                      log_dir=str(tmp_path / "l"), dropout=0.0, device="cpu", dtype="float32")
    expected = load("pretrained", bpe_data)[0].state_dict()
    expected["transformer.wpe.weight"] = expected["transformer.wpe.weight"][:16]
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_what_does_not_fit_the_weights_is_reported_together(bpe_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = flags(bpe_data, init_from=bpe_data / "pretrained", dataset="letters", n_layer=2, n_embd=8, block_size=25,
                 stride=24, norm="rmsnorm", beta1=2)
    with pytest.raises(UserError) as error:
        train_gpt2.main(args)
    for words in ("5 problems", "n_layer=2 does not fit the weights of init_from=", "have n_layer=1: leave n_layer out",
                  "block_size=25 does not fit", "norm=rmsnorm does not fit", "beta1 must be",
                  "dataset=letters does not have the vocabulary of init_from="):
        assert words in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes, words", [
    (dict(init_from="gpt-2"), "gpt-2 is neither one of gpt2, gpt2-medium, gpt2-large, gpt2-xl (did you mean gpt2?)"),
    (dict(init_from=""), "init_from='' must be"), (dict(init_from="x" * 5000), "is neither one of"),
    (dict(stride=25), "stride=25 exceeds block_size=24"), (dict(dataset="nosuch"), "unknown dataset nosuch"),
    (dict(dataset="shakespeare_char"), "dataset=shakespeare_char does not have the vocabulary"),
])
def test_problems_of_init_from(bpe_data, tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        train_gpt2.main(flags(bpe_data, **dict(init_from=bpe_data / "pretrained") | changes))
    assert words in str(error.value) and len(error.value.problems) == 1


def test_a_character_model_is_tuned_on_its_own_characters(bpe_data, tmp_path, monkeypatch):
    """A vocabulary of the right size but in another order is refused too."""
    monkeypatch.chdir(tmp_path)
    itos = read_corpus(bpe_data / "letters").tokenizer.itos
    tiny_model(vocab_size=len(itos), n_layer=1).save_pretrained("chars")
    model = {"type": "WordLevel", "vocab": {char: i for i, char in enumerate(itos)}, "unk_token": "<unk>"}
    for vocabulary, fits in ((itos, True), (itos[::-1], False)):
        model["vocab"] = {char: i for i, char in enumerate(vocabulary)}
        (tmp_path / "chars/tokenizer.json").write_text(json.dumps({"model": model}))
        fields = dict(init_from="chars", dataset="letters", data_dir=str(bpe_data), device="cpu", max_iters=1,
                      run_name=str(fits), sample_tokens=0)
        if fits:
            assert train_gpt2.train(check_run(fields, [])).progress.step == 1
        else:
            with pytest.raises(UserError, match=r"not have the vocabulary .*; they number the same tokens differently"):
                check_run(fields, [])
    with pytest.raises(UserError, match="n_embd=128 does not fit the weights"):
        check_run(fields | {"run_name": "wide", "n_embd": 128}, [])
