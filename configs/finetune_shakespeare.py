"""Fine-tunes the published GPT-2 124M on TinyShakespeare. The shape of the model comes from the weights."""

dataset = "shakespeare"
stride = 128
init_from = "gpt2"

dropout = 0.1

batch_size = 4
gradient_accumulation_steps = 8
max_iters = 40
learning_rate = 3e-5
min_lr = 3e-5
warmup_iters = 5
weight_decay = 0.1

eval_interval = 10
patience = 2
checkpoint_interval = 40
keep_checkpoints = 1
log_interval = 5
