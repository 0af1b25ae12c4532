"""Cross-entropy over a vocabulary, without ever holding all the logits.

The textbook way builds the logits (B, T, V) in 16 bit, their float32 copy and its gradient. GPT-2 124M, 4 x 1024
tokens: 4096 * 50257 * (2 + 4 + 4) bytes = 2.06 GB, eight times the model in 16 bit. Three facts make this small:

1. Only labelled tokens have a loss. In an instruction example about half of the tokens are prompt, without a label. So
   the hidden vectors of the labelled tokens are gathered first, and the others never reach the head.
2. d loss / d logits = softmax(logits) - onehot(label). This gradient is known as soon as the logits are. So the *forward*
   pass computes the gradient of the hidden vectors, (softmax - onehot) @ W, and then frees the logits. (Liger Kernel,
   arXiv:2410.10989, section 3.2, calls this FusedLinearCrossEntropy.)
3. Positions are independent. So they are processed in chunks of at most 2^24 logits on a GPU and 2^22 on a CPU, whatever
   B, T and V are. On a CPU these logits take 2^22 * 4 bytes = 16.8 MB in float32. With --amp their 16-bit copy (later
   their 16-bit gradient) adds 2^22 * 2 bytes = 8.4 MB: 25.2 MB of live tensors at a chunk's peak. A GPU has four times
   as much, 101 MB: each chunk reads W twice, and with V = 128,256 a chunk of 2^22 logits has only 32 rows for it.

One gradient (N, C) is kept for backward. GPT-2, N = 2048 labelled tokens: 2048 * 768 * 2 bytes = 3.1 MB in 16 bit.
"""
import torch
from torch.autograd.profiler import record_function
from torch.nn import functional as F

from techniques import half
from techniques.device import device_of

IGNORE = -100  # the label of a position without a loss, as everywhere in PyTorch


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, bias, labels, chunk):
        """h (N, C), weight (V, C), bias (V,) or None, labels (N,) -> the sum of -log softmax(h W^T + b)[label], float32.

        Rows with the label -100 are padding: they have no loss and no gradient. chunk: rows at a time.
        """
        need_h, need_w, need_b, *_ = ctx.needs_input_grad
        converts = h.dtype == torch.float32 != weight.dtype  # 16-bit weights, float32 products: chunk by chunk (half.py)
        w = weight if converts else weight.to(h.dtype)
        dh = torch.empty_like(h) if need_h else None
        dw = torch.zeros_like(weight, dtype=torch.float32) if need_w else None
        db = torch.zeros_like(bias, dtype=torch.float32) if need_b else None
        total = torch.zeros((), device=h.device)  # float32
        for i in range(0, len(h), chunk):
            x, y = h[i:i + chunk], labels[i:i + chunk, None]
            logits = half.times_transposed(x, w) if converts else (x @ w.t()).float()  # (n, V)
            if bias is not None:
                logits += bias
            padding = y == IGNORE
            y = y.clamp(min=0)
            # By hand and in place: torch.logsumexp would make one more copy of the logits, and exp would run twice.
            top = logits.amax(-1, keepdim=True)
            label = logits.gather(1, y)
            sums = logits.sub_(top).exp_().sum(-1, keepdim=True)
            total += (top + sums.log() - label).masked_fill(padding, 0.0).sum()
            if need_h or need_w or need_b:
                grad = logits.div_(sums.masked_fill(padding, torch.inf))  # softmax; 0 for padding
                grad.scatter_add_(1, y, padding.float() - 1)
                g = grad.to(h.dtype)
                if need_h:
                    dh[i:i + chunk] = half.times(g, w) if converts else g @ w
                if need_w:
                    dw += g.t() @ x
                if need_b:
                    db += grad.sum(0)
            logits = grad = g = None  # free this memory before the next chunk's tensors are made
        ctx.grads = dh, dw, db
        ctx.dtypes = h.dtype, weight.dtype, bias.dtype if bias is not None else None
        return total

    @staticmethod
    def backward(ctx, scale):
        grads, ctx.grads = ctx.grads, None  # ctx must not keep them: --full's dW is 154 MB (GPT-2), 524 MB (LLaMA-7B)
        return *[g if g is None else g.mul_(scale).to(t) for g, t in zip(grads, ctx.dtypes)], None, None


def sum_loss(hidden, head, labels, chunk: int | None = None, labelled=None):
    """The sum of the losses of the labelled tokens. Divide it by their number *in the whole optimizer step*.

    hidden: (B, T, C), the output of the model's `hidden`. head: the output projection (`.weight` (V, C), `.bias` or
    None). labels: (B, T), the token that each position must predict, or -100. chunk: positions at a time (default: as
    many as have Device.logits_chunk logits). labelled: the N positions in labels.view(-1) that have a label (default: they
    are searched, and the host waits for a GPU that searches). Returns a float32 scalar. Under autocast the matrix products
    run in autocast's type; the softmax always runs in float32.
    """
    with record_function("loss"):  # a name for the ledger (memory.py) and for profilers
        return gathered_loss(hidden, head, labels.reshape(-1), chunk, labelled)


def token_loss(model, batch, hidden):
    """sum_loss of a micro-batch. It is the training step's loss, unless a program gives its own (run/hooks.py)."""
    return sum_loss(hidden, model.head, batch.targets, labelled=batch.labelled)


def gathered_loss(hidden, head, labels, chunk, labelled):
    weight, bias, device = head.weight, head.bias, hidden.device.type
    if labelled is None:
        labelled = (labels != IGNORE).nonzero().squeeze(1)  # (N,)
    rest = -len(labelled) % 16  # matrix units work in tiles of 16 rows; and fewer shapes occur (see data.collate)
    h = F.pad(hidden.flatten(0, -2).index_select(0, labelled), (0, 0, 0, rest))  # (N, C)
    y = F.pad(labels[labelled], (0, rest), value=IGNORE)
    h = h.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device)
             else torch.promote_types(h.dtype, weight.dtype))
    with torch.autocast(device, enabled=False):
        if hasattr(head, "widen"):  # a head with an adapter: its rank becomes more columns of h and weight
            h, weight = head.widen(h)
        chunk = chunk or max(16, device_of(h.device).logits_chunk // len(weight) // 16 * 16)
        return LinearCrossEntropy.apply(h, weight, bias, y, chunk)
