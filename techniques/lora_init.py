"""Where an adapter starts. Two ways are better than "B = 0" when the base is quantised or the training is short.

"default"   A is random, B = 0: the model starts as the base. With a 4-bit base, this is not exactly the pretrained model.

"loftq"     LoftQ (Li et al., arXiv:2310.08659, one step of its eq. 6). The adapter starts as the best correction of the
            quantisation error that its rank allows. The codes of the base do not change.

                s B A = rank r approximation of  W - Q(W)                  s = alpha / r, Q rounds to few bits

"pissa"     PiSSA (Meng et al., arXiv:2404.02948, eq. 2-4). The adapter takes the r largest directions of W and trains
            them; the base keeps the rest, in its own bits. Without quantisation the model starts at W. In 8 or 4 bits it
            starts nearer to W than Q(W) is, because the matrix that is quantised is smaller.

                s B A = rank r approximation of  W,         base = Q(W - s B A)

The best approximation of a matrix R by rank r uses its r largest singular values (Eckart and Young, 1936): R ~ U S
V^T. As in PEFT, each factor gets the square root of S / s: B = U sqrt(S / s), A = sqrt(S / s) V^T.

W is read from the checkpoint, one tensor at a time, so a second model is never in memory. The start (A0, B0) is kept:
4 bytes for each of the adapter's parameters, beside the 16 bytes that training a parameter costs. LLaMA-7B, r = 16 on
Q and V: 34 MB beside 134 MB. The start is needed by

    peft_files.save   pissa: writes what training has changed, B A - B0 A0. It can be added to the original weights
    peft_files.load   pissa: subtracts s B0 A0 from W before W is quantised. The result is the base that was trained with
    merging.py        both: adds s (B A - B0 A0) to the original W
"""
import sys
from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm

from errors import UserError
from techniques import quant
from techniques.device import device_of

INITS = ("default", "loftq", "pissa")
STEPS = 25  # iterations of top_left


def check(init: str, bits: int, stored: int | None, alpha: float = 1.0):
    """Raise UserError where `init` is not possible. stored: the bits of a checkpoint that is quantised already, or None."""
    if init not in INITS:
        raise UserError(f"--lora-init {init}: only {', '.join(INITS)}")
    if init == "default":
        return
    if stored:
        raise UserError(f"--lora-init {init} needs the weights in full precision, and this checkpoint has {stored} bits of "
                        f"them; give the model that it was made from, with --bits {stored}")
    if init == "loftq" and bits not in (8, 4):
        raise UserError(f"--lora-init loftq corrects the quantisation error, and {bits}-bit weights have none; add --bits 4 "
                        f"or 8, or use pissa")
    if alpha <= 0:
        raise UserError(f"--lora-alpha {alpha}: must be above 0, because --lora-init {init} divides by it")


def set_start(adapters: dict, init: str, stored: Callable[[str], torch.Tensor]):
    """Set the adapters (name -> LoRALinear) to the start that `init` ("loftq" or "pissa") gives them. Raises UserError.

    stored: a function from a weight's name to the weight as the checkpoint stores it:
    float32, laid out as in the file.
    """
    for name, m in tqdm(adapters.items(), desc=f"lora-init {init}", disable=not sys.stderr.isatty(), unit="layer"):
        low_bit, device = isinstance(m.base_layer, quant.LowBitLinear), m.lora_A.device
        if not device_of(device).float64:  # top_left needs it
            device = torch.device("cpu")
        if init == "loftq" and not low_bit:  # the head is never quantised: it has the default start
            continue
        W = stored(f"{name}.weight")
        R = (W.t() if getattr(m.base_layer, "fan_in_fan_out", False) else W).to(device)  # (out, in)
        if not torch.isfinite(R).all():
            raise UserError(f"{name}.weight is not finite (NaN or infinity); the checkpoint is damaged")
        if init == "loftq":
            R = R - m.base_layer.dequantize().to(device)
        with torch.no_grad():
            for rows, A, B in zip(m.rows(), m.lora_A.split(m.r), m.lora_B):
                U, S, Vt = best(R[rows], m.r)
                root = (S / m.scale).sqrt()
                B[:, :len(S)] = U * root
                # Where S is 0 (loftq over weights that were quantised before), A keeps its random row: if both factors
                # were 0, neither would have a gradient.
                A[:len(S)] = torch.where(S[:, None] > 1e-6 * R.norm(), root[:, None] * Vt, A[:len(S)].to(device))
            m.keep_start(m.lora_A, m.B())
        if init == "pissa":
            rebase(m, W)


def rebase(m, W: torch.Tensor):
    """Set m's base to W - s B0 A0 (pissa), in its own bits. W: as the checkpoint stores it, float32.

    It is computed on the CPU, whatever the device is: every load computes it again, and must get the same codes.
    """
    base = m.base_layer
    rest, device = W - m.product(m.start_B.cpu(), m.start_A.cpu()), base.weight.device
    if isinstance(base, quant.FrozenLinear):
        m.base_layer = base.with_weight(rest).to(device)
    else:  # a new tensor, not -=: the weight of a tied head is the embedding's weight too
        base.weight = nn.Parameter(rest.to(device, base.weight.dtype), requires_grad=False)


def restore(adapters: dict, init: str, stored: Callable[[str], torch.Tensor]):
    """Give adapters that were read from a file, with their starts, the base that they were trained with.

    Arguments as for set_start.
    """
    if init == "pissa":
        for name, m in tqdm(adapters.items(), desc="lora-init pissa", disable=not sys.stderr.isatty(), unit="layer"):
            rebase(m, stored(f"{name}.weight"))


# ---------------------------------------------------------------------------------------------- Eckart and Young

@torch.no_grad()
def best(R: torch.Tensor, r: int):
    """The r largest singular values of R (m, n), float32, and their vectors: U (m, k), S (k,), Vt (k, n), k = min(r, m, n).

    top_left finds the space Q that the r left vectors span: R ~ Q Q^T R. So the SVD of the small matrix Q^T R is enough.
    """
    r = min(r, *R.shape)
    if R.shape[0] > R.shape[1]:
        V, S, Ut = best(R.t(), r)
        return Ut.t(), S, V.t()
    Q = top_left(R, r)
    U, S, Vt = torch.linalg.svd(Q.t() @ R, full_matrices=False)  # of an (r, n) matrix
    return Q @ U, S, Vt


def top_left(R: torch.Tensor, r: int) -> torch.Tensor:
    """(m, r): orthonormal columns that span the r largest left singular vectors of R (m, n), m <= n.

    These vectors are eigenvectors of R R^T. For a small matrix, torch.linalg.eigh finds them. For a large one, the best r
    vectors are searched in the span of X, (R R^T) X, (R R^T)^2 X, ... (block Lanczos, Golub and Underwood 1977). X is R
    times a random matrix of r + 8 columns. There are 25 such blocks, and each is made orthogonal to all before it.

    A quantisation error is a hard case, because its singular values hardly decrease (NF4 of a random 4096 x 4096
    matrix: the first is 1.02 times the 17th). The table gives the seconds on two busy cores, and by how much the
    result falls short of the best r = 16 approximation:

                        linalg.svd    eigh(R R^T)    this function   missed   svd_lowrank(niter=4)
        576 x 1536            2.7           0.5          0.5         0        0.1 s, 10 % missed
        4096 x 4096         128            35           10           4e-9     1 s,    3 % missed
    """
    width = r + 8
    if 2 * width * STEPS >= len(R):
        return torch.linalg.eigh(R.double() @ R.double().t())[1][:, -r:].float()
    rng = torch.Generator().manual_seed(0)  # its own: the run draws the same random numbers with every start
    span, X = R.new_empty(len(R), 0), torch.randn(R.shape[1], width, generator=rng).to(R.device)
    for _ in range(STEPS):
        X = R @ X
        X = torch.linalg.qr(X - span @ (span.t() @ X))[0]
        span = torch.cat([span, X], 1)
        X = R.t() @ X
    span = torch.linalg.qr(span)[0]  # after rounding, or for an R of small rank, it is not quite orthogonal
    P = (span.t() @ R).double()
    return span @ torch.linalg.eigh(P @ P.t())[1][:, -r:].float()
