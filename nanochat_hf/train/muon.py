"""The mathematics of Muon and AdamW: functions of tensors, which know of no parameter group and no other process.

Why apart from `optim`: there it is decided which process computes what; what is computed does not depend on that, and
here it can be held against the papers. A stack (K, m, n) of matrices of one shape is updated by

1. Nesterov momentum: `optim_kernels.nesterov`;
2. `orthogonalise`: rows equilibrated (MuonEq, arXiv:2603.28254), then five steps of Polar Express (arXiv:2505.16932);
3. `update_scale`: the norm snapped to that of a semi-orthogonal matrix (Muon+, arXiv:2602.21545), and NorMuon's
   variance reduction (arXiv:2510.05491);
4. `optim_kernels.apply_updates`: the step, at rate x max(1, m / n)^0.5, with cautious weight decay (arXiv:2510.12402).

The choice and its order are karpathy/nanochat's. All state is float32; step 2 runs in half precision
where the device has bf16.
"""

import torch
from torch import Tensor

from .kernels import compiled
from .optim_kernels import gram, product_plus, symmetric_plus

POLAR_EXPRESS = (  # for five steps: safety factor 2e-2, cushion 2
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
OBLONG = 2  # longer over shorter side from which Polar Express works on x x^T: saves a quarter of the FLOPs, 42 % at 4
COMPILED = 1 << 16  # elements from which a function on them is worth compiling


def orthogonalise(x: Tensor) -> Tensor:
    """(K, m, n) -> (K, m, n), each matrix near the closest semi-orthogonal one; a zero matrix stays zero.

    Rows are first scaled to their mean norm. The result's norm misses sqrt(min(m, n)) a little: see `update_scale`.

    Oblong matrices take the Gram form (Dao-AILab's Gram Newton-Schulz): the steps multiply x by a polynomial in x x^T,
    so that most products are of small matrices. Rounding makes some eigenvalues of x x^T negative, which further steps
    blow up: hence x and x x^T afresh after the second step, and bfloat16 comes back as float16, whose three more bits
    (nothing here is large) leave the result nearer the exact one than five steps on bfloat16's x do.
    """
    m, n = x.shape[-2:]
    tall, oblong = m > n, max(m, n) >= OBLONG * min(m, n)
    x = fused(equilibrate, x)(x, torch.float16 if oblong and x.dtype == torch.bfloat16 else x.dtype)
    if oblong:
        for steps in (POLAR_EXPRESS[:2], POLAR_EXPRESS[2:]):
            q = polynomial(gram(x.mT if tall else x), steps)
            x = x @ q if tall else q @ x
        return x
    for a, b, c in POLAR_EXPRESS:
        g = gram(x.mT if tall else x)
        z = symmetric_plus(g, g, b, c)
        x = product_plus(x, z, x, a) if tall else product_plus(z, x, x, a)
    return x


def polynomial(g: Tensor, steps: tuple[tuple, ...]) -> Tensor:
    """g = x x^T (K, m, m) -> the matrix that multiplies x as the steps would.

    A step multiplies x by z + a I. The products add a in float32: rounded into z's diagonal it would cost digits.
    Whatever is multiplied here is a polynomial in g, so it is symmetric and commutes.
    """
    for step, (a, b, c) in enumerate(steps):
        z = symmetric_plus(g, g, b, c)
        if step == 0:
            q = z.clone()
            q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            q = symmetric_plus(z, q, a)
        if step < len(steps) - 1:
            g = symmetric_plus(z, symmetric_plus(z, g, a), a)
    return q


def equilibrate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale rows to their mean norm and the whole to a spectral norm below 1, where Polar Express converges."""
    rows = x.float().square().sum(-1, keepdim=True)
    factor = rows.mean(-2, keepdim=True).sqrt() / rows.sqrt().clamp_min(1e-6)
    norm = (rows * factor.square()).sum(-2, keepdim=True).sqrt()
    return (x * (factor / (norm * 1.01 + 1e-6))).to(dtype)


def mean_squares(x: Tensor) -> Tensor:
    """(K, m, n) -> float32 means over the shorter side's index: (K, m, 1) if m >= n, else (K, 1, n)."""
    return x.float().square().mean(-1 if x.shape[-2] >= x.shape[-1] else -2, keepdim=True)


def update_scale(squares: Tensor, second: Tensor, beta2: Tensor, gate: Tensor, shape: tuple[int, int]) -> Tensor:
    """Muon+ and NorMuon: the factor on an orthogonal factor, from its `mean_squares`; `second` is updated in place.

    Rows (or columns) whose updates have been large for long are damped; the norm of the whole stays sqrt(min(m, n)).
    """
    m, n = shape
    target = min(m, n) ** 0.5
    norm = (squares.sum((-2, -1), keepdim=True) * min(m, n)).sqrt().clamp_min(1e-6)
    squares = squares * (target / norm).square()
    second.add_((1 - beta2) * gate * (squares - second))
    step = second.clamp_min(1e-10).rsqrt()
    damped = ((squares * step.square()).sum((-2, -1), keepdim=True) * min(m, n)).sqrt().clamp_min(1e-10)
    return step * (target / norm) * (target / damped)


def adamw(p, grad, first, second, step, gate, lr, beta1, beta2, eps, weight_decay) -> None:
    """Decoupled AdamW in float32 on a parameter of any dtype, in place (arXiv:1711.05101); gate 0 changes nothing."""
    lr = lr * gate
    grad, p32 = torch.where(gate > 0, grad.float(), first), p.float() * (1 - lr * weight_decay)
    first.lerp_(grad, 1 - beta1)
    second.add_((1 - beta2) * gate * (grad.square() - second))
    denominator = (second / (1 - beta2**step)).sqrt() + eps
    p.copy_(p32 - lr / (1 - beta1**step) * first / denominator)


def fused(function, x: Tensor):
    """The function, compiled if x is large and on CUDA. Scalars come as 0-d CPU tensors: no new program per value."""
    return compiled(function) if x.is_cuda and x.numel() >= COMPILED else function


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def orthogonal_dtype(device: torch.device) -> torch.dtype:
    low = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if low else torch.float32
