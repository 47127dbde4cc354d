"""The kernels alone, in a training loop of one's own: plain torch that predicts a text's next byte.

    python examples/own_loop.py        # needs torch and hfprune_fast; a few seconds on a CPU

Training takes some of the output's entropy off its loss (arXiv 1701.06548). The MLP's own backward
adds up |g·a| of each neuron; for the scores it starts below the head, with the entropy's gradient.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy, silu

from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.kernels import gated_taylor, linear_entropy, softmax_entropy


class ScoredGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, scores):
        ctx.save_for_backward(gate, up)
        ctx.scores = scores
        return silu(gate) * up

    @staticmethod
    def backward(ctx, grad):
        statistics, d_gate, d_up = gated_taylor(grad, *ctx.saved_tensors)
        ctx.scores.add_(statistics.l1)
        return d_gate, d_up, None


def hidden_of(grams):  # (B, S, 7) bytes -> (B * S, 64), the head's input for the last of 7
    x = embed(grams[..., :6]).flatten(2)
    return down(ScoredGate.apply(gate(x), up(x), scores)).flatten(0, 1)


torch.set_num_threads(1)  # products this small are no faster on more
torch.manual_seed(0)
text = torch.tensor(list((TINY_MODEL / "calibration.txt").read_bytes()))
train, held_out = text.unfold(0, 7, 1).tensor_split([-8192])
embed, gate, up = nn.Embedding(256, 32), nn.Linear(192, 256), nn.Linear(192, 256)
down, head = nn.Linear(256, 64), nn.Linear(64, 256, bias=False)
scores = torch.zeros(256, dtype=torch.float64)
optimizer = torch.optim.AdamW(nn.ModuleList([embed, gate, up, down, head]).parameters(), lr=3e-3)
for batch in train[torch.randint(len(train), (120, 16, 64))]:
    logits = head(hidden_of(batch))
    loss = cross_entropy(logits, batch[..., 6].flatten()) - 0.05 * softmax_entropy(logits).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

scores.zero_()  # training added up those of its own loss
for batch in train[:32768].view(32, 16, 64, 7):
    hidden = hidden_of(batch)
    _, d_hidden = linear_entropy(hidden, head.weight)
    hidden.backward(d_hidden)
weight, lowest, random = down.weight.clone(), scores.argsort()[:64], torch.randperm(256)[:64]
for name, removed in ("none", lowest[:0]), ("lowest quarter", lowest), ("random quarter", random):
    down.weight.data = weight.data.index_fill(1, removed, 0)
    loss = cross_entropy(head(hidden_of(held_out[None])), held_out[:, 6])
    print(f"neurons removed: {name}, cross entropy {loss:.3f} nats")
