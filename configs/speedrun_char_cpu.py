"""The fastest way on a CPU to the validation loss of nanoGPT's CPU recipe, 1.88 in windows of 64 characters."""

dataset = "shakespeare_char"
stride = 1

n_layer = 3
n_head = 2
n_embd = 128
block_size = 64
bias = False
pos = "rope"

batch_size = 16
max_iters = 320
optimizer = "muon"
learning_rate = 0.02
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 5
weight_decay = 0.1
beta2 = 0.95

eval_interval = 320
checkpoint_interval = 320
