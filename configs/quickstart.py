"""The first run: a small modern GPT reads Python's language reference, which every Python ships with.

No download. 1.594, 1.586 and 1.592 bits per byte (seeds 1337, 1, 2; Python 3.11's text), 2 min 17 s on 2 cores of an
Intel Xeon with AMX, in bfloat16. LayerNorm and GELU in the same shape differ little (notes/06_speed.md).
"""

dataset = "pydoc"

n_layer = 5
n_head = 2
n_embd = 128
block_size = 256
norm = "rmsnorm"
mlp = "swiglu"
pos = "rope"
qk_norm = True
bias = False

batch_size = 8
max_iters = 1250
stride = 32
optimizer = "muon"
learning_rate = 0.015
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 10
weight_decay = 0.4
beta2 = 0.95

eval_interval = 250
sample_tokens = 400
checkpoint_interval = 250
