"""The first run: a small modern GPT reads Python's language reference, which every Python ships with.

No download. 1.590, 1.611 and 1.608 bits per byte (seeds 1337, 1, 2; Python 3.11's text), 3 min 44 s on 2 cores of an
AMD EPYC (Zen 3, float32); about two minutes where bfloat16 is fast. LayerNorm and GELU in the same shape differ little
(notes/06_speed.md).
"""

dataset = "pydoc"

n_layer = 4
n_head = 2
n_embd = 128
block_size = 128
norm = "rmsnorm"
mlp = "swiglu"
pos = "rope"
qk_norm = True
bias = False

batch_size = 16
max_iters = 1450
stride = 32
optimizer = "muon"
learning_rate = 0.015
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 10
weight_decay = 0.4
beta2 = 0.95

eval_interval = 290
sample_tokens = 400
checkpoint_interval = 290
