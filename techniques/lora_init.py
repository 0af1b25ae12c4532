"""Where an adapter starts: two ways that are better than "B = 0" when the base is quantised, or training is to be short.

"default"   A random, B = 0: the model is the base. Over 4-bit weights that is already not the model that was pretrained.

"loftq"     LoftQ (Li et al., arXiv:2310.08659, one step of its eq. 6): the adapter starts at the best correction of the
            quantisation error that its rank allows. The base's codes stay as they are.

                s B A = rank r approximation of  W - Q(W)                  s = alpha / r

"pissa"     PiSSA (Meng et al., arXiv:2404.02948, eq. 2-4): the adapter takes over the r largest directions of W and trains
            them; the base keeps the rest, in its own bits. It starts at W, and in 8 or 4 bits nearer to W than Q(W) is,
            because what is quantised has become smaller.

                s B A = rank r approximation of  W,         base = Q(W - s B A)

The best approximation of R by rank r is that of its r largest singular values (Eckart and Young, 1936), R ~ U S V^T, and as
in PEFT both factors get half of it: B = U sqrt(S / s), A = sqrt(S / s) V^T.

W comes from the checkpoint, one tensor at a time: there is never a second model in memory. The start (A0, B0) is kept,
4 bytes for each of the adapter's numbers beside the 16 of training them (LLaMA-7B, r = 16 on Q and V: 34 MB and 134), since

    lora.save   writes what training has changed, B A - B0 A0, which anybody can add to the original weights (pissa)
    lora.load   must subtract B0 A0 from W before it quantises, to have the base that was trained with (pissa)
    merging     adds B A - B0 A0 to the original W (both)
"""
import sys
from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm

from errors import UserError
from techniques import quant

INITS = ("default", "loftq", "pissa")
STEPS = 25  # of the iteration in top_left


def check(init: str, bits: int, stored: int | None, alpha: float = 1.0):
    """Raise UserError where `init` has no meaning. stored: 8 or 4 for a checkpoint that is quantised already."""
    if init not in INITS:
        raise UserError(f"--lora-init {init}: only {', '.join(INITS)}")
    if init == "default":
        return
    if stored:
        raise UserError(f"--lora-init {init} needs the weights in full precision, and this checkpoint has {stored} bits of "
                        f"them; give the model it was made from, with --bits {stored}")
    if init == "loftq" and bits not in (8, 4):
        raise UserError(f"--lora-init loftq corrects the error of quantisation, and weights of {bits} bits have none to "
                        f"correct; add --bits 4 or 8, or use pissa")
    if alpha <= 0:
        raise UserError(f"--lora-alpha {alpha}: --lora-init {init} divides by it, it must be above 0")


def set_start(adapters: dict, init: str, bits: int, stored: Callable[[str], torch.Tensor]):
    """Set adapters (name -> LoRALinear) to where "loftq" or "pissa" lets them start. Raises UserError.

    bits: of the model's weights. stored: the name of a weight -> the weight as stored, float32, in the file's layout.
    """
    for name, m in tqdm(adapters.items(), desc=f"lora-init {init}", disable=not sys.stderr.isatty(), unit="layer"):
        low_bit, device = isinstance(m.base_layer, quant.LowBitLinear), m.lora_A.device
        if init == "loftq" and not low_bit:  # the head is never quantised: it has the default start
            continue
        W = stored(f"{name}.weight")
        R = (W.t() if getattr(m.base_layer, "fan_in_fan_out", False) else W).to(device)  # (out, in)
        if not torch.isfinite(R).all():
            raise UserError(f"{name}.weight is not finite (NaN or infinity); the checkpoint is damaged")
        if init == "loftq":
            R = R - m.base_layer.dequantize()
        with torch.no_grad():
            for rows, A, B in zip(m.rows(), m.lora_A.split(m.r), m.lora_B):
                U, S, Vt = best(R[rows], m.r)
                half = (S / m.scale).sqrt()
                B[:, :len(S)] = U * half
                # A direction without any error (weights that were quantised before) keeps its random row of A: with both
                # factors 0 neither would have a gradient.
                A[:len(S)] = torch.where(S[:, None] > 1e-6 * R.norm(), half[:, None] * Vt, A[:len(S)])
            m.keep_start(m.lora_A, m.B())
        if init == "pissa":
            rebase(m, W, bits)


def rebase(m, W: torch.Tensor, bits: int):
    """The base of a pissa adapter, W - s B0 A0, in its own bits. W: as the checkpoint has it, float32.

    On the CPU whatever the device: it is done anew whenever the adapter is loaded, and has to give the same codes.
    """
    base = m.base_layer
    rest, device = W - m.start_delta().cpu(), base.weight.device
    if isinstance(base, quant.LowBitLinear):
        m.base_layer = quant.quantize(base, rest, bits).to(device)
    else:  # a new tensor, not -=: a tied head's weight is the embedding too
        base.weight = nn.Parameter(rest.to(device, base.weight.dtype), requires_grad=False)


def restore(adapters: dict, init: str, bits: int, stored: Callable[[str], torch.Tensor]):
    """After adapters and their starts have been read from a file: the base that they were trained with. As set_start."""
    if init == "pissa":
        for name, m in tqdm(adapters.items(), desc="lora-init pissa", disable=not sys.stderr.isatty(), unit="layer"):
            rebase(m, stored(f"{name}.weight"), bits)


# ---------------------------------------------------------------------------------------------- Eckart and Young

@torch.no_grad()
def best(R: torch.Tensor, r: int):
    """The r largest singular values of R (m, n), float32, and their vectors: U (m, k), S (k,), Vt (k, n), k = min(r, m, n).

    Everything follows from the space that the r left vectors span: R ~ U U^T R.
    """
    r = min(r, *R.shape)
    if R.shape[0] > R.shape[1]:
        V, S, Ut = best(R.t(), r)
        return Ut.t(), S, V.t()
    Q = top_left(R, r)
    U, S, Vt = torch.linalg.svd(Q.t() @ R, full_matrices=False)  # (r, n)
    return Q @ U, S, Vt


def top_left(R: torch.Tensor, r: int) -> torch.Tensor:
    """(m, r): orthonormal, spanning the r largest left singular vectors of R (m, n), m <= n.

    They are eigenvectors of R R^T, which is all there is to do for a small matrix. For a large one the best r vectors are
    looked for in the span of X, (R R^T) X, (R R^T)^2 X, ... (block Lanczos, Golub and Underwood 1977): 25 blocks of r + 8
    random columns, each made orthogonal to all before it.

    A quantisation error is hard for it: its singular values hardly fall off (NF4 of a random 4096 x 4096 matrix: the first
    is 1.02 times the 17th). Seconds on two busy cores, and how much of the best possible r = 16 approximation is missed:

                        linalg.svd    eigh(R R^T)    these two    missed      svd_lowrank(niter=4)
        576 x 1536            2.7           0.5          0.5      0           0.1,  10 %
        4096 x 4096         128            35           10        4e-9        1,    3 %
    """
    width = r + 8
    if 2 * width * STEPS >= len(R):
        return torch.linalg.eigh(R.double() @ R.double().t())[1][:, -r:].float()
    rng = torch.Generator().manual_seed(0)  # its own: the run's random numbers are those of the other starts
    span, X = R.new_empty(len(R), 0), torch.randn(R.shape[1], width, generator=rng).to(R.device)
    for _ in range(STEPS):
        X = R @ X
        X = torch.linalg.qr(X - span @ (span.t() @ X))[0]
        span = torch.cat([span, X], 1)
        X = R.t() @ X
    span = torch.linalg.qr(span)[0]  # rounding, or a matrix of small rank, has left it not quite orthogonal
    P = (span.t() @ R).double()
    return span @ torch.linalg.eigh(P @ P.t())[1][:, -r:].float()
