"""AdamW (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2): what the training step does with its gradients.

    m <- b1 m + (1 - b1) g            the gradient, smoothed
    v <- b2 v + (1 - b2) g^2          its square, smoothed
    p <- p - lr wd p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

m and v are two float32 values for every trained parameter: 8 bytes. With the float32 parameter and its gradient, a
trained parameter costs 16 bytes; a frozen one costs 2. There are four ways to keep m and v. The table gives their bytes
a parameter, and what full fine-tuning of LLaMA-7B (6.74e9 parameters) then needs before its activations:

                        on the GPU                             in host memory     LLaMA-7B: GPU     host
    adamw               4 weight + 4 gradient + 8 state                           107.8 GB
    adamw8bit           4 + 4 + 2 + 8/256                                          67.6 GB
    paged_adamw8bit     4 + 4                                  2 + 8/256           53.9 GB          13.7 GB
    offload_adamw       2 weight                               4 + 4 + 8           13.5 GB         107.8 GB

(offload_adamw with --amp.) LoRA with r = 16 on Q and V trains 8.4M parameters: 134 MB with adamw, with little to save.

**8 bit.** Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861), as in bitsandbytes.

* m and v are cut into blocks of 256 elements. Each block is divided by its largest magnitude (absmax, kept in float32).
* Each quotient is replaced by the number (one byte) of the nearest of 256 fixed values, the *dynamic code*. The code
  covers seven decades from 1e-7 to 1, and each decade has twice as many values as the one below it. So the error at 0.5
  is at most 1.4 %, and 1e-5 and 2e-5 still have different codes. v is never negative: its code has no sign, and half
  this error.
* An outlier spoils the precision of its own block only. Zero is a code: an element whose gradient is zero from the start
  does not move (but for weight decay).
* Tensors below 4,096 elements keep 32-bit states, as in bitsandbytes. Norms and biases are only 0.1 % of a model.

    state["exp_avg"]            (blocks, 256) uint8       the tensor in rows of 256, the last row padded with zeros
    state["exp_avg_absmax"]     (blocks, 1) float32       m = code[exp_avg] * exp_avg_absmax;   exp_avg_sq likewise

**Paged.** The same states wait in host memory, and each chunk of them is on the GPU only while the step needs it. AdamW
uses its state once a step, after the activations have been freed: the two need not be on the GPU at the same time.

**Offloaded.** 16-bit weights alone would not learn: bfloat16 has 8 bits of precision, and 0.05 + 1e-4 rounds to 0.05.
So the true weights, the *masters*, are float32 in host memory with m and v beside them. The GPU holds their rounded
16-bit copies.

Making a torch.optim optimizer imports PyTorch's compiler (72 MB, 2 seconds). AdamW below computes what
torch.optim.AdamW(fused=True) computes, without this import.
"""
from collections import defaultdict
from functools import lru_cache

import torch
from torch.nn import functional as F

from techniques.device import device_of


class AdamW:
    """The part of torch.optim.Optimizer's interface that train.py and GradScaler use.

    groups: [{"params": [...], "weight_decay": float}, ...]. state: {parameter: {"step", "exp_avg", "exp_avg_sq"}}, made
    at the parameter's first step.
    """

    def __init__(self, groups: list[dict], lr: float, betas=(0.9, 0.999), eps: float = 1e-8):
        self.param_groups = [{**g, "lr": lr, "betas": betas, "eps": eps} for g in groups]
        self.state: dict[torch.Tensor, dict] = defaultdict(dict)

    def master(self, p: torch.Tensor) -> torch.Tensor:
        """The tensor that is updated, clipped and saved for the model's parameter p: p itself, unless offloaded."""
        return p

    def init_state(self, p: torch.Tensor) -> dict:
        """Make a parameter's state before its first step: all zeros. --resume then writes the saved state into it."""
        self.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                         "exp_avg_sq": torch.zeros_like(p)}
        return self.state[p]

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.init_state(p)
            self.update(params, group)

    def update(self, params: list, group: dict):
        if not params:
            return
        t, m, v = ([self.state[p][key] for p in params] for key in ("step", "exp_avg", "exp_avg_sq"))
        torch._foreach_add_(t, 1)
        # The formulas above in one kernel, which reads and writes each element once and needs no temporary tensors. As
        # separate operations, a step takes 371 ms instead of 107 (GPT-2, --full), 16 ms instead of 2.5 (SmolLM2, LoRA).
        torch._fused_adamw_(params, [p.grad for p in params], m, v, [], t, lr=group["lr"], beta1=group["betas"][0],
                            beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"],
                            amsgrad=False, maximize=False)

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


# ---------------------------------------------------------------------------------------------- 8 bit

BLOCK = 256
MIN_8BIT = 4096


def dynamic_code(signed: bool) -> torch.Tensor:
    """The 256 values of the paper's section 2.2 in rising order, float32: 0, 1, and seven decades.

    Signed, the decades have 1, 2, 4, ..., 64 values of each sign; unsigned, they have twice as many. A decade is cut into
    equal steps, and its values are the middles of these steps.
    """
    values = [torch.zeros(1), torch.ones(1)]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i + 1 - signed) + 1)
        middles = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


def ordered_bits(x: torch.Tensor) -> torch.Tensor:
    """float32 x in [-1, 1] -> an int32 key >= 0: the bits of x, all flipped if x < 0. Rises with x on either side of 0.

    The upper 16 bits of the key (sign, exponent, 7 bits of mantissa) are the number of x's *bin*, one of 32,768.
    """
    bits = x.view(torch.int32)
    return torch.bitwise_right_shift(bits, 31).bitwise_xor_(bits)  # (>> takes twice as long)


@lru_cache
def tables(signed: bool, device) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables of quantise and dequantise: (code, bins). On a CPU, a look-up in `bins` takes 1 ns an element; a search
    among the 255 bounds between codes takes 65 ns.

    A bin contains at most one bound. Let c be the code of the bin's first value, and b the lower 16 bits of the bound's
    key (no bound: b = 65535). x has the next code if the lower 16 bits of its key are above b:

        code of x = c + (lower bits of x's key > b) = (c * 2^16 + 65535 - b + lower bits of x's key) >> 16

    bins[bin] is the sum in brackets without its last term, minus bin * 2^16. So quantize can add the whole key.
    """
    code = dynamic_code(signed)
    bounds = (code[1:] + code[:-1]) / 2  # a tie takes the lower code, as in bitsandbytes
    starts = torch.arange(2**15, dtype=torch.int32) << 16  # each bin's first key
    first = torch.where(starts < 2**30, starts, ~starts).view(torch.float32)  # and the value with this key
    bins = (torch.bucketize(first, bounds, out_int32=True) << 16) - starts
    b = ordered_bits(bounds)
    bins[b >> 16] += 65535 - (b & 65535)
    return code.to(device), bins.to(device)


def dequantize(q: torch.Tensor, absmax: torch.Tensor, signed: bool) -> torch.Tensor:
    """q (blocks, 256) uint8, absmax (blocks, 1) -> (blocks, 256) float32."""
    code, _ = tables(signed, q.device)
    return code.index_select(0, q.flatten().int()).view(q.shape).mul_(absmax)


def quantize(x: torch.Tensor, q: torch.Tensor, absmax: torch.Tensor, signed: bool):
    """x (blocks, 256) float32 is written into q (blocks, 256) uint8 and absmax (blocks, 1). x itself is overwritten."""
    torch.amax(x.abs() if signed else x, dim=1, keepdim=True, out=absmax)
    x.mul_(1 / absmax.clamp(min=torch.finfo(torch.float32).tiny))
    k = ordered_bits(x) if signed else x.view(torch.int32)
    _, bins = tables(signed, x.device)
    bin = torch.bitwise_right_shift(k, 16).view(-1)
    q.copy_(bins.index_select(0, bin).view(x.shape).add_(k).bitwise_right_shift_(16))


class AdamW8bit(AdamW):
    """AdamW with m and v in 8 bits: 2 + 8/256 bytes a parameter.

    A step works on one chunk at a time (Device.optimizer_chunk). Its temporaries take 24 bytes an element of the chunk:
    24 * 2^22 = 101 MB on a GPU, 24 * 2^17 = 3.1 MB on a CPU.
    Plain PyTorch reads and writes each element some thirty times, the fused kernel only once. On one CPU core a step
    takes 25 ns an element instead of 1.5 (bitsandbytes: 52). GPT-2 with --full: 3.1 s a step instead of 0.2.

    state: {parameter: {"step", "exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax"}}; for tensors below 4,096
    elements as in AdamW.
    """

    KEYS = ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")
    home = {}  # torch.zeros's arguments for the states: where they are, if not beside the parameter

    def init_state(self, p):
        if p.numel() < MIN_8BIT:
            return super().init_state(p)
        n, home = -(-p.numel() // BLOCK), {"device": p.device, **self.home}
        self.state[p] = {"step": torch.zeros(())}
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[p][name] = torch.zeros(n, BLOCK, dtype=torch.uint8, **home)
            self.state[p][name + "_absmax"] = torch.zeros(n, 1, **home)
        return self.state[p]

    def update(self, params, group):
        super().update([p for p in params if p.numel() < MIN_8BIT], group)
        large = [p for p in params if p.numel() >= MIN_8BIT]
        for p in large:
            self.state[p]["step"] += 1
        chunks = list(self.chunks(large))
        if chunks and (few := device_of(large[0].device).pieces):
            chunks = sorted(chunks, key=lambda c: -sum(j - i for _, i, j in c))[:few]  # the largest ones
        self.update_chunks(chunks, group)

    def chunks(self, params):
        """Yields lists of (parameter, first block, last block + 1), each list at most one chunk.

        A large matrix is cut into slices. Small matrices share a chunk: one LoRA matrix has some 5,000 elements, and 25
        operations on so few would be all overhead. All parameters of a chunk have made the same number of steps.
        """
        chunk, left = [], 0
        for p in params:
            size, n, i = device_of(p.device).optimizer_chunk // BLOCK, -(-p.numel() // BLOCK), 0
            while i < n:
                if chunk and (not left or self.state[p]["step"] != self.state[chunk[0][0]]["step"]):
                    yield chunk
                    chunk = []
                left = left if chunk else size
                j = min(n, i + left)
                chunk.append((p, i, j))
                left, i = left - (j - i), j
        if chunk:
            yield chunk

    def update_chunks(self, chunks, group):
        for chunk in chunks:
            states = self.fetch(chunk)
            self.update_chunk(chunk, states, group)
            self.put_back(chunk, states)

    def slices(self, chunk, key) -> list[torch.Tensor]:
        return [self.state[p][key][i:j] for p, i, j in chunk]

    def fetch(self, chunk) -> list[torch.Tensor]:
        return [join(self.slices(chunk, key)) for key in self.KEYS]

    def put_back(self, chunk, states):
        if len(chunk) > 1:  # (`join` does not copy a single slice: its states were updated in place)
            for key, joined in zip(self.KEYS, states):
                torch._foreach_copy_(self.slices(chunk, key), joined.split([j - i for _, i, j in chunk]))

    def update_chunk(self, chunk, states, group):
        (b1, b2), lr, decay = group["betas"], group["lr"], 1 - group["lr"] * group["weight_decay"]
        mq, m_absmax, vq, v_absmax = states
        g = join([in_blocks(p.grad, i, j) for p, i, j in chunk])
        m = dequantize(mq, m_absmax, True).mul_(b1).add_(g, alpha=1 - b1)
        v = dequantize(vq, v_absmax, False).mul_(b2).addcmul_(g, g, value=1 - b2)
        t = self.state[chunk[0][0]]["step"].item()
        c2 = (1 - b2**t) ** 0.5
        root = v.sqrt().add_(group["eps"] * c2)  # numerator and denominator times c2: saves a division
        sizes = [j - i for _, i, j in chunk]
        for (p, i, j), m_p, root_p in zip(chunk, m.split(sizes), root.split(sizes)):
            x = p.view(-1)[i * BLOCK:j * BLOCK]
            if decay != 1:
                x.mul_(decay)
            x.addcdiv_(m_p.view(-1)[:len(x)], root_p.view(-1)[:len(x)], value=-lr * c2 / (1 - b1**t))
        quantize(m, mq, m_absmax, True)
        quantize(v, vq, v_absmax, False)


def join(blocks: list[torch.Tensor]) -> torch.Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def in_blocks(x: torch.Tensor, i: int, j: int) -> torch.Tensor:
    """Blocks i to j - 1 of x as (j - i, 256), the last one padded with zeros."""
    x = x.reshape(-1)[i * BLOCK:j * BLOCK]
    return F.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK) if len(x) % BLOCK else x.view(-1, BLOCK)


class PagedAdamW8bit(AdamW8bit):
    """AdamW8bit whose states wait in host memory. While it steps, the device holds two chunks of them.

    On CUDA, a second stream copies chunk i + 1 to the GPU and chunk i - 1 back while chunk i is computed. The host
    memory is pinned, so the copies run beside the computation (PyTorch rounds each pinned tensor up to a power of two
    bytes). Each direction moves 2 + 8/256 bytes an element. LLaMA-7B: 2 * 13.7 GB a step, about one second at 25 GB/s
    (PCIe 4.0 x16). On a CPU the same copies are made, one after the other.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.device = next(p.device for g in self.param_groups for p in g["params"])
        self.cuda = self.device.type == "cuda"
        self.home = {"device": device_of(self.device).host, "pin_memory": self.cuda}
        self.side = torch.cuda.Stream(self.device) if self.cuda else None

    def update_chunks(self, chunks, group):
        ahead = self.fetch(chunks[0]) if chunks else None
        for n, chunk in enumerate(chunks):
            states = ahead
            ahead = self.fetch(chunks[n + 1]) if n + 1 < len(chunks) else None
            if self.cuda:  # wait until this chunk has arrived, but not for the next one
                torch.cuda.current_stream(self.device).wait_event(states.pop())
            self.update_chunk(chunk, states, group)
            self.put_back(chunk, states)
        if self.cuda:
            self.side.synchronize()  # the states in host memory are complete before anyone reads (saves) them

    def fetch(self, chunk):
        with torch.cuda.stream(self.side):
            states = [join([x.to(self.device, non_blocking=True, copy=True) for x in self.slices(chunk, key)])
                      for key in self.KEYS]
            return [*states, self.side.record_event()] if self.cuda else states

    def put_back(self, chunk, states):
        # The GPU's copies were allocated on the side stream, so their memory is reused in this stream's order: after
        # the copy below, which waits for the computation. So no later fetch writes into memory that the computation
        # still reads.
        if self.cuda:
            self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            for key, joined in zip(self.KEYS, states):
                for state, x in zip(self.slices(chunk, key), joined.split([j - i for _, i, j in chunk])):
                    state.copy_(x, non_blocking=True)


# ---------------------------------------------------------------------------------------------- offloaded

class OffloadAdamW(AdamW):
    """AdamW on float32 masters. They, their gradients, m and v are in host memory; `device` holds the weights as `dtype`.

    It takes float32 parameters and moves them: their values become the masters, and copies rounded to `dtype` go to the
    device. param_groups hold the masters, so GradScaler, clipping and saving see float32 gradients and the true weights.

    The device holds one gradient at a time. As soon as backward has computed it, it is copied to the host (2 bytes an
    element in 16 bit) and added to the master's gradient in float32. After the step, the new weights are copied to the
    device (2 bytes). LLaMA-7B: 13.5 + 13.5 = 27 GB a step with one micro-batch.

    On CUDA, gradients pass through two pinned buffers in turn, each as large as the largest parameter. The GPU fills one
    by itself, and the host waits only for the gradient before, which it adds while the GPU computes the next.
    """

    def __init__(self, groups, lr, device="cpu", dtype=torch.float32, **kwargs):
        self.host = device_of(device).host
        masters = {p: p.detach().to(self.host, torch.float32) for g in groups for p in g["params"]}
        super().__init__([{**g, "params": [masters[p] for p in g["params"]]} for g in groups], lr, **kwargs)
        self.masters, self.staging, self.arriving = masters, [], None
        if torch.device(device).type == "cuda":
            largest = max(m.numel() for m in masters.values())
            self.staging = [torch.empty(largest, dtype=dtype, pin_memory=True) for _ in range(2)]
        for p, master in masters.items():
            p.data = master.to(device, dtype, copy=True)
            p.register_post_accumulate_grad_hook(self.take_gradient)

    def master(self, p):
        return self.masters[p]

    def take_gradient(self, p):
        grad, p.grad = p.grad, None
        if not self.staging:
            return self.add(self.masters[p], grad.to(self.host))  # crosses the bus as `dtype`
        self.staging.reverse()
        staged = self.staging[0][:grad.numel()].view_as(grad)
        staged.copy_(grad, non_blocking=True)
        copied = torch.cuda.current_stream(grad.device).record_event()
        if self.arriving is None:  # this backward's first gradient: when backward ends, add its last one
            torch.autograd.Variable._execution_engine.queue_callback(self.add_arrived)
        self.add_arrived()
        self.arriving = self.masters[p], staged, copied

    def add_arrived(self):
        if self.arriving:
            master, staged, copied = self.arriving
            copied.synchronize()
            self.add(master, staged.to(torch.float32, copy=True))
            self.arriving = None

    def add(self, master, grad):
        master.grad = grad.float() if master.grad is None else master.grad.add_(grad)

    @torch.no_grad()
    def step(self):
        super().step()
        for p, master in self.masters.items():
            p.copy_(master)


OPTIMIZERS = {"adamw": AdamW, "adamw8bit": AdamW8bit, "paged_adamw8bit": PagedAdamW8bit, "offload_adamw": OffloadAdamW}
