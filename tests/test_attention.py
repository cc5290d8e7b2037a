"The attention kernels against PyTorch, without a GPU by Triton's interpreter."
import os, subprocess, sys

import pytest
import torch

script = '''
import torch
from aam.attention import attention, backward_tiles, forward_tiles, plain_attention
torch.manual_seed(0)
for rows, bases, heads, width in ((2, 150, 2, 32), (3, 70, 2, 24), (1, 64, 1, 96), (1, 1, 3, 16)):
    x = torch.randn(rows, bases, 3*heads*width, requires_grad=True)
    expected = plain_attention(x, heads)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    with torch.no_grad():
        found, lse = forward_tiles(x, heads)
        gradient = backward_tiles(grad.mT.contiguous().mT, x, found, lse, heads)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, x.grad, rtol=1e-4, atol=1e-5)
print('the same')
'''


def test_kernels_by_interpreter():
    pytest.importorskip('triton')
    done = subprocess.run([sys.executable, '-c', script], env=os.environ | {'TRITON_INTERPRET': '1'}, capture_output=True, text=True)
    assert done.stdout.strip() == 'the same', done.stderr[-2000:]


def relative(found, expected): return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('bases,heads,width', [(150, 4, 32), (253, 2, 128), (97, 3, 96), (512, 2, 16), (1, 2, 64)])
@pytest.mark.parametrize('compiled', [False, True])
def test_kernels_on_a_gpu(dtype, bases, heads, width, compiled):
    "No further from double precision than PyTorch's kernels are, values and gradients, plain and compiled."
    from aam.attention import attention, fits_tiles, plain_attention
    torch.manual_seed(0)
    x = torch.randn(9, bases, 3*heads*width, device='cuda', dtype=dtype)
    grad = torch.randn(9, bases, heads*width, device='cuda', dtype=dtype)
    assert fits_tiles(x, heads)
    def both(function, x):
        x = x.detach().requires_grad_()
        y = function(x, heads)
        y.backward(grad.to(x.dtype))
        return y.detach(), x.grad
    exact, theirs = both(plain_attention, x.double()), both(plain_attention, x)
    ours = both(torch.compile(attention) if compiled else attention, x)
    for mine, other, truth in zip(ours, theirs, exact): assert relative(mine, truth) < 1.2*relative(other, truth) + 1e-6
