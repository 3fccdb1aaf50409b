"""nanoGPT's GPU recipe for TinyShakespeare's characters: its 10.65M-parameter "baby GPT"."""

dataset = "shakespeare_char"
stride = 1  # nanoGPT draws windows at every offset

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2
bias = False

batch_size = 64
max_iters = 5000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
weight_decay = 0.1
beta2 = 0.99
