"""nanoGPT's published CPU recipe: GPT-2's architecture, 0.8M parameters, on TinyShakespeare's characters."""

dataset = "shakespeare_char"
stride = 1  # nanoGPT draws windows at every offset

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
dropout = 0.0
bias = False

batch_size = 12
max_iters = 2000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
weight_decay = 0.1
beta2 = 0.99
