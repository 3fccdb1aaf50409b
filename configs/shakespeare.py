"""A small GPT-2 on TinyShakespeare in GPT-2's own byte-level BPE: 50,257 symbols, 302 thousand tokens."""

dataset = "shakespeare"
stride = 32

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
dropout = 0.2

batch_size = 8
max_iters = 1450
learning_rate = 2e-3
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 50
weight_decay = 0.3

eval_interval = 290
checkpoint_interval = 290
