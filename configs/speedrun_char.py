"""The fastest way on a GPU to the validation loss of nanoGPT's baby GPT, 1.4697 in windows of 256 characters."""

dataset = "shakespeare_char"
stride = 1

n_layer = 6
n_head = 4
n_embd = 256
block_size = 256
dropout = 0.15
bias = False
norm = "rmsnorm"
mlp = "swiglu"
pos = "rope"

batch_size = 32
max_iters = 1300
optimizer = "muon"
learning_rate = 6e-3
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 20
weight_decay = 0.1

eval_interval = 260
checkpoint_interval = 1300
