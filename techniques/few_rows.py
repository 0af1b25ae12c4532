"""x W^T for few rows of x, in float32 on a CPU: what a model that replies does for each token, with a row for each reply.

Such a product should take the time to read W once. F.linear hands it to MKL, whose way is not always the best for few rows.
All 211 matrices of SmolLM2-135M (538 MB) on 2 cores of a Xeon with AVX-512, in ms:

    rows          1     2     4     8    15    16
    F.linear     31    33    50    63    86    71
    here         28    38    48    58    68    73

* One row: a product of a matrix and a vector.
* A matrix that is much taller than wide (SwiGLU's gate and up, the head) is stored column by column: then a core reads
  several columns at the same time, and memory gives 26 GB/s instead of 20. (Two rows are slower so; one is the usual case.)
* Up to 15 rows: blocks of W that stay in a core's cache while all rows of x meet them. One batched product computes them
  all, and each core takes whole blocks. With AVX2 this is no faster, so device.py says whether to do it.
"""
import torch
from torch import nn
from torch.nn import functional as F

from techniques.device import device_of

ROWS, COLUMNS = 64, 32  # of W, in a block
MOST_SUMS = 2**20  # partial sums that exist at the same time: 4 MB


class FewRows(nn.Linear):
    """The same layer. x (B, T, in) -> (B, T, out)."""

    blocks = None  # a function: x (rows, in), W -> (rows, out)
    fewest = 2  # rows for which it is faster

    def forward(self, x):
        weight, bias = self._parameters.values()  # (self.weight is a search: 211 of them take 0.3 ms)
        if x.numel() == self.in_features:
            x = x.reshape(-1)
            return (torch.mv(weight, x) if bias is None else torch.addmv(bias, weight, x)).view(1, 1, -1)
        rows = x.numel() // self.in_features
        if self.blocks is None or not self.fewest <= rows < 16 or torch.is_grad_enabled():
            return F.linear(x, weight, bias)
        y = self.blocks(x.reshape(rows, -1), weight).view(*x.shape[:2], -1)
        return y if bias is None else y + bias


def row_blocks(x, W):
    """W = (W1; W2; ...), 64 rows each: y = (x W1^T, x W2^T, ...)."""
    W = W.view(-1, ROWS, W.shape[1])
    y = torch.bmm(x.expand(len(W), -1, -1), W.mT)  # (blocks, rows of x, 64)
    return y.transpose(0, 1).reshape(len(x), -1)


def column_blocks(x, W):
    """W = (W1, W2, ...) and x = (x1, x2, ...), 32 columns each: y = x1 W1^T + x2 W2^T + ..."""
    rows, out = len(x), len(W)
    x, W = x.view(rows, -1, COLUMNS).transpose(0, 1), W.t().view(-1, COLUMNS, out)  # (blocks, rows, 32), (blocks, 32, out)
    y, step = x.new_empty(rows, out), MOST_SUMS // (len(x) * rows)
    room = device_of("cpu").room(("few rows",), MOST_SUMS, lambda n: torch.empty(n))  # new memory would take as long again
    for a in range(0, out, step):
        part = W[:, :, a:a + step]
        sums = room[:len(x) * rows * part.shape[2]].view(len(x), rows, -1)
        torch.sum(torch.bmm(x, part, out=sums), 0, out=y[:, a:a + step])
    return y


def for_few_rows(model):
    """Let the float32 layers of a model that only replies compute as above. Values, shapes and bytes stay."""
    for m in model.modules():
        if type(m) is nn.Linear and m.weight.dtype == torch.float32 and m.weight.device.type == "cpu":
            m.__class__ = FewRows
            by_columns = m.out_features > 2 * m.in_features and m.in_features <= 1024  # a wide one would have too many sums
            if by_columns:
                m.weight.data = m.weight.data.t().contiguous().t()
            if device_of("cpu").product_blocks and not (m.in_features % COLUMNS if by_columns else m.out_features % ROWS):
                m.blocks, m.fewest = (column_blocks, 2) if by_columns else (row_blocks, 4)
