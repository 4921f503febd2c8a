"""What Muon's step does on a GPU: symmetric matrix products, and passes over many matrices at once.

The optimizer's step reads and writes every parameter, gradient and momentum; torch's foreach operations and the
copies into stacks and back do that several times over. Here one Triton kernel takes the addresses of all matrices of a
shape. Polar Express multiplies matrices by their own transposes, of which half need not be computed (Dao-AILab/quack's
symmetric product). Everything has a plain twin for other devices, and the tests hold the two together.
"""

from functools import partial

import torch
from torch import Tensor

from ..kernel_checks import check, triton, unavailable, usable

try:
    from quack.gemm_interface import gemm_add, gemm_symmetric
except Exception as error:  # a version that does not fit may raise anything
    gemm_add = gemm_symmetric = unavailable("quack-kernels", error)

SMALLEST = 1024  # rows and columns from which quack's products save more than the host takes to launch them
BLOCK = 4096  # elements of a program

if triton is not None:
    import triton.language as tl

    @triton.jit
    def _nesterov(grads, momenta, gate, out, numel, mu, BLOCK: tl.constexpr):
        which = tl.program_id(1).to(tl.int64)
        where = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = where < numel
        grad = tl.multiple_of(tl.load(grads + which).to(tl.pointer_type(tl.float32)), 16) + where
        momentum = tl.multiple_of(tl.load(momenta + which).to(tl.pointer_type(tl.float32)), 16) + where
        g, m = tl.load(grad, mask=inside), tl.load(momentum, mask=inside)
        g = tl.where(tl.load(gate) > 0, g, m)
        m += (1.0 - mu) * (g - m)
        tl.store(momentum, m, mask=inside)
        tl.store(out + which * numel + where, (g + mu * (m - g)).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _apply(weights, x, scale, gate, numel, columns, rate, decay, PER_ROW: tl.constexpr, BLOCK: tl.constexpr):
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
        p -= tl.load(gate) * rate * (u + tl.where(u * p >= 0, decay * p, 0.0))
        tl.store(param, p, mask=inside)


def many(tensors: list[Tensor]) -> bool:
    """Whether the Triton kernels take these: float32, dense, on CUDA, 16-byte aligned."""
    return all(
        usable("Muon passes", t)
        and t.numel()
        and t.dtype == torch.float32
        and t.is_contiguous()
        and t.data_ptr() % 16 == 0
        for t in tensors
    )


def addresses(tensors: list[Tensor]) -> Tensor:
    """Their addresses, on their device; through pinned memory, so that the host does not wait."""
    numbers = torch.tensor([t.data_ptr() for t in tensors])
    return numbers.pin_memory().to(tensors[0].device, non_blocking=True) if tensors[0].is_cuda else numbers


def nesterov(grads: list[Tensor], momenta: list[Tensor], mu: float, out: Tensor, gate: Tensor) -> None:
    """m <- mu m + (1 - mu) g in place, out[i] <- mu m + (1 - mu) g; lists of (m, n), out (at least as many, m, n).

    gate: () on their device; 0 leaves m as it is, whatever g holds, and gives m.
    """
    if many([*grads, *momenta]) and out.is_contiguous():
        numel = grads[0].numel()
        grid = (triton.cdiv(numel, BLOCK), len(grads))
        _nesterov[grid](addresses(grads), addresses(momenta), gate, out, numel, mu, BLOCK=BLOCK)
        return
    grads = [torch.where(gate > 0, grad.float(), momentum) for grad, momentum in zip(grads, momenta)]
    torch._foreach_lerp_(momenta, grads, 1 - mu)
    torch._foreach_copy_(list(out[: len(grads)].unbind()), torch._foreach_lerp(grads, momenta, mu))


def apply_updates(params: list[Tensor], x: Tensor, scale: Tensor, rate: float, decay: float, gate: Tensor) -> None:
    """p -= rate (u + decay p [u p >= 0]), u = scale x, in place: decay only where the update agrees (cautious).

    Args:
        params: K float32 matrices (m, n). x: (K, m, n). scale: (K, m, 1) or (K, 1, n).
        gate: () on their device, a factor on the rate: 0 leaves p as it is.
    """
    if many(params) and x.is_contiguous() and scale.is_contiguous():
        numel, columns = params[0].numel(), params[0].shape[1]
        grid = (triton.cdiv(numel, BLOCK), len(params))
        per_row = scale.shape[1] == params[0].shape[0]
        _apply[grid](addresses(params), x, scale, gate, numel, columns, rate, decay, PER_ROW=per_row, BLOCK=BLOCK)
        torch.autograd.graph.increment_version(params)  # copies of them are out of date now (`leaves.Copies`)
        return
    for p, part, factor in zip(params, x, scale):
        u = part.float() * factor
        p.sub_(gate * rate * (u + decay * p * (u * p >= 0)))


def symmetric(x: Tensor) -> bool:
    large = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and min(x.shape[-2:]) >= SMALLEST
    ready = large and gemm_symmetric is not None and usable("Muon products", x)
    return ready and all(size % 16 == 0 for size in x.shape[-2:])


def gram(x: Tensor) -> Tensor:
    """x (K, m, n) -> x x^T (K, m, m)."""
    return gemm_symmetric(x, x.mT) if symmetric(x) else x @ x.mT


def symmetric_plus(a: Tensor, b: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    """Symmetric a, b (K, m, m) that commute -> alpha a b + beta b, which is symmetric, too."""
    if symmetric(b):
        return gemm_symmetric(a, b, C=b, alpha=alpha, beta=beta)
    return torch.baddbmm(b, a, b, beta=beta, alpha=alpha)


def product_plus(a: Tensor, b: Tensor, old: Tensor, factor: float) -> Tensor:
    """a (K, m, l) times b (K, l, n) plus factor * old (K, m, n)."""
    if symmetric(old):
        return gemm_add(a, b, old, beta=factor, tuned=False)
    return torch.baddbmm(old, a, b, beta=factor)


@check("Muon passes", instead="PyTorch's operations on lists")
def _cases(draw, config):
    draw = partial(draw, dtype=torch.float32)
    grads, momenta, x, gate = draw(3, 96, 100), draw(3, 96, 100), draw(3, 96, 100), draw(1).new_ones(())
    scales = [draw(3, 96, 1).abs(), draw(3, 1, 100).abs()]

    def passes():
        moved, out, weights = list(momenta.clone().unbind()), torch.zeros_like(x), [x.clone() for _ in scales]
        nesterov(list(grads.unbind()), moved, 0.9, out, gate)
        for weight, scale in zip(weights, scales):
            apply_updates(list(weight.unbind()), out, scale, 0.1, 0.5, gate)
        return [torch.stack(moved), out, *weights]

    yield 1e-4, passes


@check("Muon products", instead="PyTorch's products of whole matrices")
def _product_cases(draw, config):
    if gemm_symmetric is None or config.hidden_size < SMALLEST:
        return
    for dtype in (torch.bfloat16, torch.float16):
        x = draw(2, config.hidden_size, 2 * config.hidden_size, dtype=dtype) / (2 * config.hidden_size) ** 0.5

        def products(x=x):
            a = gram(x)
            return [a, symmetric_plus(a, a, 0.7, 0.3), product_plus(a, x, x, 1.5)]

        yield 0.02, products
