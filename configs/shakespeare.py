"""A small GPT-2 on TinyShakespeare in GPT-2's own byte-level BPE: 50,257 symbols, 302 thousand tokens.

Validation loss 4.720 (seed 1337), 5 min 51 s on 2 cores of an Intel Xeon with AMX, in bfloat16; in float32 4.733, 4.741
and 4.734 (seeds 1337, 1, 2), 11 min 27 s on 2 cores of an AMD EPYC with AVX2 alone (Zen 3).
With --optimizer=muon --learning_rate=0.01 --batch_size=16 --max_iters=500 --dropout=0.1 4.667, after 69% of the tokens.
"""

dataset = "shakespeare"
stride = 32

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128

batch_size = 8
max_iters = 1450
learning_rate = 2e-3
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 50
weight_decay = 0.3
beta2 = 0.9999  # most symbols are rare: shorter second moments fade between two gradients, and steps get too large

eval_interval = 290
checkpoint_interval = 290
