"""TinyShakespeare's characters, the recommended run: a small modern model, Muon, windows of 256.

Validation loss 1.512 (seed 1337), 3 min 42 s on 2 cores of an AMD EPYC (Zen 5, AVX512_BF16); in float32 1.514 and 1.508
(seeds 1 and 2).
"""

dataset = "shakespeare_char"
stride = 1

n_layer = 4
n_head = 3
n_embd = 192
block_size = 256
bias = False
norm = "rmsnorm"
mlp = "swiglu"
pos = "rope"

batch_size = 16
max_iters = 700
optimizer = "muon"
learning_rate = 0.01
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 10
weight_decay = 0.1
beta2 = 0.95

eval_interval = 175
checkpoint_interval = 350
