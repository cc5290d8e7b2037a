"""The attention kernels beside PyTorch's, on 1,616 rows of 150 bases (an `aam pretrain` batch of speed.py); errors against double precision.

    python benchmarks/attention.py [--sizes default,medium,large] [--tiles]
    TRITON_INTERPRET=1 python benchmarks/attention.py --rows 2 # without a GPU, only the errors

`--tiles` launches them in other ways, and tries a forward kernel that takes the width of a head in two parts, so that 96 numbers are 64 and 32 and not 128.
"""
import argparse, itertools, math
from functools import partial

import torch
try: import triton, triton.language as tl
except ImportError: raise SystemExit('the kernels are written in Triton, which comes with PyTorch for GPUs and is not here') from None
from torch.nn.attention import SDPBackend, sdpa_kernel

from aam import attention as kernels
from aam.attention import backward_tiles, forward_tiles, plain_attention

sizes = dict(default=(4, 32), medium=(6, 128), large=(12, 96)) # heads, width of a head
bases = 150

@triton.jit
def _read(base, rows, there, stride, D:tl.constexpr, first:tl.constexpr, W:tl.constexpr):
    columns = first + tl.arange(0, W)
    return tl.load(base + rows[:, None]*stride + columns, there[:, None] & (columns < D), 0.)

@triton.jit
def _write(base, x, rows, there, stride, D:tl.constexpr, first:tl.constexpr, W:tl.constexpr):
    columns = first + tl.arange(0, W)
    tl.store(base + rows[:, None]*stride + columns, x.to(base.dtype.element_ty), there[:, None] & (columns < D))

@triton.jit
def _forward_in_two(project, out, lse, scale, T:tl.constexpr, H:tl.constexpr, D:tl.constexpr, W:tl.constexpr, V:tl.constexpr, M:tl.constexpr, N:tl.constexpr):
    "As `_forward` of aam.attention, a head as columns 0 to `W` and `W` to `W + V`."
    tiles = tl.cdiv(T, M)
    program = tl.program_id(0)
    row, head = (program // tiles // H).to(tl.int64), program // tiles % H
    queries = program % tiles * M + tl.arange(0, M)
    project += row*(T*3*H*D) + head*D
    q, q2 = _read(project, queries, queries < T, 3*H*D, D, 0, W), _read(project, queries, queries < T, 3*H*D, D, W, V)
    top, total, mixed, mixed2 = tl.full((M,), float('-inf'), tl.float32), tl.zeros((M,), tl.float32), tl.zeros((M, W), tl.float32), tl.zeros((M, V), tl.float32)
    for start in range(0, T, N):
        keys = start + tl.arange(0, N)
        there = keys < T
        k, v = _read(project + H*D, keys, there, 3*H*D, D, 0, W), _read(project + 2*H*D, keys, there, 3*H*D, D, 0, W)
        k2, v2 = _read(project + H*D, keys, there, 3*H*D, D, W, V), _read(project + 2*H*D, keys, there, 3*H*D, D, W, V)
        score = tl.where(there, tl.dot(q2, tl.trans(k2), tl.dot(q, tl.trans(k)))*scale, float('-inf'))
        higher = tl.maximum(top, tl.max(score, 1))
        weight, shrink = tl.exp2(score - higher[:, None]), tl.exp2(top - higher)
        total = total*shrink + tl.sum(weight, 1)
        mixed, mixed2 = tl.dot(weight.to(v.dtype), v, mixed*shrink[:, None]), tl.dot(weight.to(v.dtype), v2, mixed2*shrink[:, None])
        top = higher
    out += row*(T*H*D) + head*D
    _write(out, mixed/total[:, None], queries, queries < T, H*D, D, 0, W)
    _write(out, mixed2/total[:, None], queries, queries < T, H*D, D, W, V)
    tl.store(lse + (row*H + head)*T + queries, top + tl.log2(total), queries < T)

def forward(x, heads, in_two:bool, M:int, N:int, warps:int, stages:int):
    B, T, D = x.shape[0], x.shape[1], x.shape[2]//3//heads
    out, lse, W = x.new_empty(B, T, heads*D), x.new_empty(B, heads, T, dtype=torch.float32), triton.next_power_of_2(D)
    kernel, widths = (_forward_in_two, dict(W=W//2, V=triton.next_power_of_2(D - W//2))) if in_two else (kernels._forward, dict(W=W))
    kernel[B*heads*triton.cdiv(T, M),](x, out, lse, D**-.5*math.log2(math.e), T=T, H=heads, D=D, M=M, N=N, **widths, num_warps=warps, num_stages=stages)
    return out, lse

def backward(grad, x, out, lse, heads, M:int, N:int, warps:int, stages:int):
    B, T, D, found = x.shape[0], x.shape[1], x.shape[2]//3//heads, torch.empty_like(x)
    kernels._backward[2*B*heads*triton.cdiv(T, M),](x, out, lse, grad, found, D**-.5*math.log2(math.e), T=T, H=heads, D=D, W=triton.next_power_of_2(D), M=M, N=N, num_warps=warps, num_stages=stages)
    return found

def milliseconds(function, repeats:int=20) -> float:
    for _ in range(3): function()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(repeats): function()
    ended.record(); torch.cuda.synchronize()
    return began.elapsed_time(ended)/repeats

def plainly(x, heads, backend):
    with sdpa_kernel(backend): return plain_attention(x, heads)

def both_plainly(grad, x, heads, backend):
    x.grad = None
    plainly(x, heads, backend).backward(grad)
    return x.grad

def run(size:str, rows:int, tiles:bool, gpu:bool):
    "Prints a line for each way of computing attention."
    device, dtype = ('cuda', torch.bfloat16) if gpu else ('cpu', torch.float16) # the interpreter has no bf16
    heads, D = sizes[size]
    torch.manual_seed(0)
    x, grad = (torch.randn(rows, bases, n*heads*D, device=device, dtype=dtype) for n in (3, 1))
    exact = x[:2].double().cpu().requires_grad_()
    expected = plain_attention(exact, heads)
    expected.backward(grad[:2].double().cpu())
    def show(name, truth, function, *given):
        found = function(*given)
        error = ((found if torch.is_tensor(found) else found[0])[:2].double().cpu() - truth).norm()/truth.norm()
        print(f"{size:<8} {name:<50} error {error:.1e}" + (f'  {milliseconds(partial(function, *given)):7.3f} ms' if gpu else ''), flush=True)
    out, lse = forward(x, heads, False, 64, 32, 4, 3)
    if gpu:
        show('forward', expected, forward_tiles, x, heads)
        show('backward', exact.grad, backward_tiles, grad, x, out, lse, heads)
        for backend in SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION:
            show(f"PyTorch's {backend.name}: forward", expected.detach(), plainly, x, heads, backend)
            show(f"PyTorch's {backend.name}: forward and backward", exact.grad, both_plainly, grad, x.clone().requires_grad_(), heads, backend)
    if not tiles and gpu: return
    for in_two, N, stages in itertools.product((False, True) if D & (D - 1) else (False,), (32, 64), (2, 3)):
        show(f"forward{' in two parts' if in_two else ''}, tiles of 64 x {N}, {stages} stages", expected, forward, x, heads, in_two, 64, N, 4, stages)
    for N, stages in itertools.product((32, 64), (1, 2)): show(f'backward, tiles of 64 x {N}, {stages} stages', exact.grad, backward, grad, x, out, lse, heads, 64, N, 4, stages)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--sizes', default='default,medium,large'); p.add_argument('--rows', type=int, default=1616); p.add_argument('--tiles', action='store_true')
    args, gpu = p.parse_args(), torch.cuda.is_available()
    if unknown := set(args.sizes.split(',')) - set(sizes): p.error(f"--sizes: {', '.join(sorted(unknown))}; there are {', '.join(sizes)}")
    print(f"{torch.cuda.get_device_name() if gpu else 'interpreter'}, torch {torch.__version__}, triton {triton.__version__}")
    for size in args.sizes.split(','): run(size, args.rows, args.tiles, gpu)

if __name__ == '__main__': main()
