import pytest
import torch
from instruction_sets import kernel_only

from pydiffseq.ops import timestep_attention, timestep_self_attention


def make(dtype=torch.float32, table=False):
    """qkv, tau, u, w (leaves) and the rest of the arguments by name."""
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 13, 3, 2, 20), (7, 2, 20) if table else (2, 13, 2, 20), (2, 20), (2, 20)]
    leaves = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    mask = torch.arange(13) < torch.tensor([[13], [9]])
    timesteps = torch.randint(0, 7, (2, 13), generator=g) if table else None
    return leaves, {"timesteps": timesteps, "key_mask": mask, "dropout_p": 0.2, "seed": 5}


def by_parts(qkv, *rest, **options):
    return timestep_attention(*qkv.unbind(2), *rest, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("table", [False, True])
def test_same_output_and_gradients_as_of_the_three_parts(dtype, table):
    leaves, options = make(dtype, table)
    results = []
    for attend in (timestep_self_attention, by_parts):
        out = attend(*leaves, **options)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype and torch.equal(ours, expected)


@kernel_only
def test_gradient_of_a_projection_that_is_not_contiguous():
    leaves, options = make()
    wide = torch.cat([leaves[0], leaves[0]], 1).detach().requires_grad_()
    grads = []
    for qkv in (wide[:, :13], wide[:, :13].contiguous()):
        grads.append(torch.autograd.grad(timestep_self_attention(qkv, *leaves[1:], **options).sum(), wide)[0])
    assert torch.equal(*grads) and grads[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    leaves, options = make(dtype)
    arguments = (*leaves, None, options["key_mask"], torch.tensor([3]), 0.2, 0.25)
    torch.library.opcheck(torch.ops.pydiffseq.timestep_self_attention.default, arguments)
    detached = [x.detach() for x in leaves]
    out, lse = torch.ops.pydiffseq.timestep_self_attention(*detached, *arguments[4:])
    torch.library.opcheck(torch.ops.pydiffseq.timestep_self_attention_backward.default, (
        torch.randn_like(out), *detached, None, options["key_mask"], torch.tensor([3]), out, lse, 0.2, 0.25))


def test_compiles_as_one_graph():
    leaves, options = make()
    compiled = torch.compile(lambda *x: timestep_self_attention(*x, **options) * 2, fullgraph=True)
    for a, b in zip(*(torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (
            compiled, lambda *x: timestep_self_attention(*x, **options) * 2)), strict=True):
        torch.testing.assert_close(a, b)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"qkv must have shape \[B, N, 3, H, D\], got \[2, 9, 2, 16\]"):
        timestep_self_attention(torch.zeros(2, 9, 2, 16))
    with pytest.raises(ValueError, match=r"tau must have shape \[2, 9, 2, 16\]"):
        timestep_self_attention(torch.zeros(2, 9, 3, 2, 16), torch.zeros(2, 8, 2, 16))
