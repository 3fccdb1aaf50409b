"""The modern family at the size of the project's first experiment: TinyShakespeare as characters, 10 epochs."""

dataset = "shakespeare_char"

n_layer = 6
n_head = 8
n_embd = 256
block_size = 256
norm = "rmsnorm"
mlp = "swiglu"
pos = "sinusoidal"

epochs = 10
batch_size = 128
learning_rate = 1e-3
weight_decay = 0.01
grad_clip = 1.0

eval_interval = 50
checkpoint_interval = 50
log_interval = 10
