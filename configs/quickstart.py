"""The first run: a small modern GPT reads Python's language reference, which every Python ships with.

No download; a few minutes on two CPU cores.
"""

dataset = "pydoc"

n_layer = 4
n_head = 6
n_embd = 192
block_size = 128
norm = "rmsnorm"
mlp = "swiglu"
pos = "sinusoidal"
bias = False

batch_size = 16
max_iters = 1000
stride = 32
learning_rate = 2e-3
warmup_iters = 100
weight_decay = 0.1

eval_interval = 250
checkpoint_interval = 250
