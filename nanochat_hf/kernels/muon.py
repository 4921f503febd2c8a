"""The mathematics of Muon and AdamW, as functions of tensors: which rank computes what is decided in `optim`.

A stack (K, m, n) of matrices of one shape is updated by

1. `nesterov`: Nesterov momentum;
2. `orthogonalize`: rows equilibrated (MuonEq, arXiv:2603.28254), then five steps of Polar Express (arXiv:2505.16932);
3. `update_scale`: the norm set to that of a semi-orthogonal matrix (Muon+, arXiv:2602.21545), and NorMuon's variance
   reduction (arXiv:2510.05491);
4. `apply_updates`: the step, at learning rate x max(1, m / n)^0.5, with cautious weight decay (arXiv:2510.12402).

The choice and its order are karpathy/nanochat's. All state is float32; step 2 runs in half precision where the device
has bf16. Products of a matrix and its transpose are symmetric: quack's GEMM on GPUs computes half of them. Steps 1 and
4 read and write every parameter. On GPUs one Triton kernel takes the addresses of all matrices of a shape; foreach
operations would make several passes.
"""

from functools import partial

import torch
from torch import Tensor

from .backend import check, compiled, tl, triton, unavailable, usable

try:
    from quack.gemm_interface import gemm_add, gemm_symmetric
except Exception as error:  # a version that does not fit may raise anything
    gemm_add = gemm_symmetric = unavailable("quack-kernels", error)

MUON_KERNELS = ("Muon passes", "Muon matmuls")
POLAR_EXPRESS = (  # for five steps: safety factor 2e-2, cushion 2
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
OBLONG = 2  # longer over shorter side from which Polar Express works on x x^T: saves a quarter of the FLOPs, 42 % at 4
COMPILED = 1 << 16  # elements from which a function on them is worth compiling
BLOCK = 4096  # elements per program of the kernels
SMALLEST = 1024  # rows and columns from which quack's GEMMs save more than the host takes to launch them

if triton is not None:

    @triton.jit
    def _nesterov(grads, buffers, step_factor, out, numel, mu, BLOCK: tl.constexpr):
        which = tl.program_id(1).to(tl.int64)
        where = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = where < numel
        grad = tl.multiple_of(tl.load(grads + which).to(tl.pointer_type(tl.float32)), 16) + where
        momentum = tl.multiple_of(tl.load(buffers + which).to(tl.pointer_type(tl.float32)), 16) + where
        g, m = tl.load(grad, mask=inside), tl.load(momentum, mask=inside)
        g = tl.where(tl.load(step_factor) > 0, g, m)
        m += (1.0 - mu) * (g - m)
        tl.store(momentum, m, mask=inside)
        tl.store(out + which * numel + where, (g + mu * (m - g)).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _apply(weights, x, scale, step_factor, numel, columns, lr, decay, PER_ROW: tl.constexpr, BLOCK: tl.constexpr):
        which = tl.program_id(1).to(tl.int64)
        where = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = where < numel
        param = tl.multiple_of(tl.load(weights + which).to(tl.pointer_type(tl.float32)), 16) + where
        p = tl.load(param, mask=inside)
        if PER_ROW:
            factor = tl.load(scale + which * (numel // columns) + where // columns, mask=inside)
        else:
            factor = tl.load(scale + which * columns + where % columns, mask=inside)
        u = tl.load(x + which * numel + where, mask=inside).to(tl.float32) * factor
        p -= tl.load(step_factor) * lr * (u + tl.where(u * p >= 0, decay * p, 0.0))
        tl.store(param, p, mask=inside)


def orthogonalize(x: Tensor) -> Tensor:
    """(K, m, n) -> (K, m, n), each matrix near the closest semi-orthogonal one; a zero matrix stays zero.

    Rows are first scaled to their mean norm. The result's norm misses sqrt(min(m, n)) a little: see `update_scale`.

    Oblong matrices take the Gram form (Dao-AILab's Gram Newton-Schulz): x times a polynomial in x x^T, so that most
    matmuls are of small matrices. Rounding makes some eigenvalues of x x^T negative, and further steps amplify those.
    Hence x and x x^T are computed anew after the second step. bfloat16 comes back as float16: three more bits.
    """
    m, n = x.shape[-2:]
    tall, oblong = m > n, max(m, n) >= OBLONG * min(m, n)
    x = maybe_compiled(equilibrate, x)(x, torch.float16 if oblong and x.dtype == torch.bfloat16 else x.dtype)
    if oblong:
        for steps in (POLAR_EXPRESS[:2], POLAR_EXPRESS[2:]):
            q = polynomial(gram(x.mT if tall else x), steps)
            x = x @ q if tall else q @ x
        return x
    for a, b, c in POLAR_EXPRESS:
        g = gram(x.mT if tall else x)
        z = symmetric_plus(g, g, b, c)
        x = matmul_plus(x, z, x, a) if tall else matmul_plus(z, x, x, a)
    return x


def polynomial(g: Tensor, steps: tuple[tuple, ...]) -> Tensor:
    """g = x x^T (K, m, m) -> the matrix that multiplies x as the steps would.

    A step multiplies x by z + a I. The matmuls add a in float32: rounded into z's diagonal it would lose digits. Every
    matrix here is a polynomial in g, so it is symmetric and they commute.
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


def update_scale(squares: Tensor, second: Tensor, beta2: Tensor, step_factor: Tensor, shape: tuple) -> Tensor:
    """Muon+ and NorMuon: the factor on an orthogonal factor (m, n) = shape, from its `mean_squares`; updates `second`.

    Rows (or columns) with large updates in the past are damped; the norm of the whole stays sqrt(min(m, n)).
    """
    m, n = shape
    target = min(m, n) ** 0.5
    norm = (squares.sum((-2, -1), keepdim=True) * min(m, n)).sqrt().clamp_min(1e-6)
    squares = squares * (target / norm).square()
    second.add_((1 - beta2) * step_factor * (squares - second))
    step = second.clamp_min(1e-10).rsqrt()
    damped = ((squares * step.square()).sum((-2, -1), keepdim=True) * min(m, n)).sqrt().clamp_min(1e-10)
    return step * (target / norm) * (target / damped)


def adamw(p, grad, first, second, step, step_factor, lr, beta1, beta2, eps, weight_decay) -> None:
    """Decoupled AdamW in float32 on a parameter of any dtype, in place (arXiv:1711.05101). step_factor 0: skip."""
    lr = lr * step_factor
    grad, p32 = torch.where(step_factor > 0, grad.float(), first), p.float() * (1 - lr * weight_decay)
    first.lerp_(grad, 1 - beta1)
    second.add_((1 - beta2) * step_factor * (grad.square() - second))
    denominator = (second / (1 - beta2**step)).sqrt() + eps
    p.copy_(p32 - lr / (1 - beta1**step) * first / denominator)


def fits_pointer_kernels(tensors: list[Tensor]) -> bool:
    """Whether the Triton kernels take these: float32, dense, 16-byte aligned, on CUDA."""
    usable_all = all(usable("Muon passes", t) and t.numel() and t.dtype == torch.float32 for t in tensors)
    return usable_all and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors)


def addresses(tensors: list[Tensor]) -> Tensor:
    """Their addresses, on their device; through pinned memory, so that the host does not wait."""
    pointers = torch.tensor([t.data_ptr() for t in tensors])
    return pointers.pin_memory().to(tensors[0].device, non_blocking=True) if tensors[0].is_cuda else pointers


def nesterov(grads: list[Tensor], buffers: list[Tensor], mu: float, out: Tensor, step_factor: Tensor) -> None:
    """m <- mu m + (1 - mu) g in place, out[i] <- mu m + (1 - mu) g; lists of (m, n), out (at least as many, m, n).

    step_factor: () on their device; 0: m stays as it is, whatever g holds, and out[i] is m.
    """
    if fits_pointer_kernels([*grads, *buffers]) and out.is_contiguous():
        numel = grads[0].numel()
        grid = (triton.cdiv(numel, BLOCK), len(grads))
        _nesterov[grid](addresses(grads), addresses(buffers), step_factor, out, numel, mu, BLOCK=BLOCK)
        return
    grads = [torch.where(step_factor > 0, grad.float(), momentum) for grad, momentum in zip(grads, buffers)]
    torch._foreach_lerp_(buffers, grads, 1 - mu)
    torch._foreach_copy_(list(out[: len(grads)].unbind()), torch._foreach_lerp(grads, buffers, mu))


def apply_updates(
    params: list[Tensor], x: Tensor, scale: Tensor, lr: float, decay: float, step_factor: Tensor
) -> None:
    """p -= lr (u + decay p [u p >= 0]), u = scale x, in place: decay only where the update agrees (cautious).

    params: K float32 matrices (m, n). x: (K, m, n). scale: (K, m, 1) or (K, 1, n). step_factor: () on their device, a
    factor on the learning rate; 0: p stays as it is.
    """
    if fits_pointer_kernels(params) and x.is_contiguous() and scale.is_contiguous():
        numel, columns = params[0].numel(), params[0].shape[1]
        grid, per_row = (triton.cdiv(numel, BLOCK), len(params)), scale.shape[1] == params[0].shape[0]
        pointers = addresses(params)
        _apply[grid](pointers, x, scale, step_factor, numel, columns, lr, decay, PER_ROW=per_row, BLOCK=BLOCK)
        torch.autograd.graph.increment_version(params)  # so that `WeightCastCache` casts them again
        return
    for p, part, factor in zip(params, x, scale):
        u = part.float() * factor
        p.sub_(step_factor * lr * (u + decay * p * (u * p >= 0)))


def maybe_compiled(function, x: Tensor):
    """The function, compiled if x is large and on CUDA. Scalars come as 0-d CPU tensors: no new program per value."""
    return compiled(function) if x.is_cuda and x.numel() >= COMPILED else function


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def orthogonal_dtype(device: torch.device) -> torch.dtype:
    """In which matrices are orthogonalized."""
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if has_bf16 else torch.float32


def uses_symmetric(x: Tensor) -> bool:
    large = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and min(x.shape[-2:]) >= SMALLEST
    ready = large and gemm_symmetric is not None and usable("Muon matmuls", x)
    return ready and all(size % 16 == 0 for size in x.shape[-2:])


def gram(x: Tensor) -> Tensor:
    """x (K, m, n) -> x x^T (K, m, m)."""
    return gemm_symmetric(x, x.mT) if uses_symmetric(x) else x @ x.mT


def symmetric_plus(a: Tensor, b: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    """Symmetric a, b (K, m, m) that commute -> alpha a b + beta b, which is symmetric, too."""
    if uses_symmetric(b):
        return gemm_symmetric(a, b, C=b, alpha=alpha, beta=beta)
    return torch.baddbmm(b, a, b, beta=beta, alpha=alpha)


def matmul_plus(a: Tensor, b: Tensor, c: Tensor, factor: float) -> Tensor:
    """a (K, m, l) times b (K, l, n) plus factor * c (K, m, n)."""
    return gemm_add(a, b, c, beta=factor, tuned=False) if uses_symmetric(c) else torch.baddbmm(c, a, b, beta=factor)


@check("Muon passes", instead="PyTorch's foreach operations")
def _cases(draw, config):
    draw = partial(draw, dtype=torch.float32)
    grads, buffers, x = draw(3, 96, 100), draw(3, 96, 100), draw(3, 96, 100)
    scales = [draw(3, 96, 1).abs(), draw(3, 1, 100).abs()]

    def passes(factor):
        new, out, weights = list(buffers.clone().unbind()), torch.zeros_like(x), [x.clone() for _ in scales]
        nesterov(list(grads.unbind()), new, 0.9, out, factor)
        for weight, scale in zip(weights, scales):
            apply_updates(list(weight.unbind()), out, scale, 0.1, 0.5, factor)
        return [torch.stack(new), out, *weights]

    for step_factor in (1.0, 0.0):  # a step, and one that is skipped
        yield 1e-4, partial(passes, x.new_full((), step_factor))


@check("Muon matmuls", instead="PyTorch's matmuls of whole matrices")
def _matmul_cases(draw, config):
    if gemm_symmetric is None or config.hidden_size < SMALLEST:
        return
    for dtype in (torch.bfloat16, torch.float16):
        x = draw(2, config.hidden_size, 2 * config.hidden_size, dtype=dtype) / (2 * config.hidden_size) ** 0.5

        def matmuls(x=x):
            a = gram(x)
            return [a, gram(x.mT), symmetric_plus(a, a, 0.7, 0.3), matmul_plus(a, x, x, 1.5)]

        yield 0.02, matmuls
