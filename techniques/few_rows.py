"""x W^T for few rows of x, in float32 on a CPU: what a model that replies does for each token, with a row for each reply.

Such a product should take the time to read W once. F.linear hands it to MKL, whose way is not always the best for few rows.
All 211 matrices of SmolLM2-135M (538 MB) on 2 cores of a Xeon, in ms:

    rows                       1     2     4     8    15    16
    AVX-512      F.linear     27    29    46    57    75    73
                 here         25    31    40    46    55    73
    AVX2 alone   F.linear     30    41    44    68    80    69
                 here         27    34    35    58    72    71

* One row: a product of a matrix and a vector.
* A matrix that is much taller than wide (SwiGLU's gate and up, the head) is stored column by column: then a core reads
  several columns at the same time, and memory gives 26 GB/s instead of 20.
* 2 to 15 rows of such a matrix: blocks of W that stay in a core's cache while all rows of x meet them. One batched product
  computes them all, and each core takes whole blocks. The other matrices gain nothing by blocks. device.py says whether
  this CPU does.
"""
import torch
from torch import nn
from torch.nn import functional as F

from techniques.device import device_of

COLUMNS = 32  # of W, in a block
MOST_SUMS = 2**19  # partial sums that exist at the same time: 2 MB


class FewRows(nn.Linear):
    """The same layer. x (B, T, in) -> (B, T, out)."""

    in_blocks = False  # whether 2 to 15 rows meet blocks of W

    def forward(self, x):
        weight, bias = self._parameters.values()  # (self.weight is a search: 211 of them take 0.3 ms)
        if x.numel() == self.in_features:
            x = x.reshape(-1)
            return (torch.mv(weight, x) if bias is None else torch.addmv(bias, weight, x)).view(1, 1, -1)
        rows = x.numel() // self.in_features
        if not self.in_blocks or not 2 <= rows < 16 or torch.is_grad_enabled():
            return F.linear(x, weight, bias)
        y = column_blocks(x.reshape(rows, -1), weight).view(*x.shape[:2], -1)
        return y if bias is None else y + bias


def column_blocks(x, W):
    """x (rows, in), W (out, in) by columns -> (rows, out).

    W = (W1, W2, ...) and x = (x1, x2, ...), 32 columns each: y = x1 W1^T + x2 W2^T + ..."""
    rows, out = len(x), len(W)
    x, W = x.view(rows, -1, COLUMNS).transpose(0, 1), W.t().view(-1, COLUMNS, out)  # (blocks, rows, 32), (blocks, 32, out)
    y = [torch.bmm(x, part).sum(0) for part in W.split(MOST_SUMS // (len(x) * rows), 2)]  # the head is in several parts
    return y[0] if len(y) == 1 else torch.cat(y, 1)


def for_few_rows(model):
    """Let the float32 layers of a model that only replies compute as above. Values, shapes and bytes stay."""
    for m in model.modules():
        if type(m) is nn.Linear and m.weight.dtype == torch.float32 and m.weight.device.type == "cpu":
            m.__class__ = FewRows
            if m.out_features > 2 * m.in_features and m.in_features <= 1024:  # a wider one would have too many sums
                m.weight.data = m.weight.data.t().contiguous().t()
                m.in_blocks = device_of("cpu").product_blocks and m.in_features % COLUMNS == 0
