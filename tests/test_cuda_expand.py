"""The layout of `cuda_lscd` made dense on a GPU, whole and in part."""

import pytest
import torch
from torch import Tensor

from gossamer.formats.bitmask import Bitmask
from gossamer.kernels import Case, KernelError, Packed
from gossamer.kernels._cuda_operands import DTYPES
from gossamer.kernels.cuda_expand import CudaExpand
from gossamer.kernels.cuda_lscd import CudaLscd, pack_dense

SHAPES = [(1, 1), (7, 24), (16, 256), (33, 257), (64, 1000), (100, 513), (300, 4104)]


def sparse(m: int, k: int, density: float, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(m, k) * (torch.rand(m, k) < density)).to(dtype)


def packed(a: Tensor, words: bool | None = None) -> Packed:
    """With values or whole registers as items; None: as the kernel chooses."""
    return CudaExpand.pack(Bitmask.encode(a), a.dtype) if words is None else pack_dense(a, words)


@pytest.mark.parametrize("words", [False, True])
def test_parts_of_the_rows(words: bool) -> None:
    a = sparse(100, 513, 0.3)
    whole = packed(a, words)
    for begin, end in ((0, 32), (32, 96), (64, 100), (0, 100)):
        part = CudaExpand.rows(whole, begin, end)
        assert part is not None
        assert part.tensors[0].untyped_storage().data_ptr() == whole.tensors[0].untyped_storage().data_ptr()
        assert torch.equal(CudaExpand.unpack(part.tensors, part.meta), a[begin:end])
    assert CudaExpand.rows(whole, 16, 64) is None and CudaExpand.rows(whole, 0, 40) is None


def test_refusals() -> None:
    spec = Bitmask.encode(sparse(16, 32, 0.5)).spec()
    assert "NVIDIA GPU" in (CudaExpand.refuses(Case(spec, torch.device("cpu"), torch.bfloat16, 1)) or "")
    assert CudaExpand.pack.__func__ is CudaLscd.pack.__func__, "one layout for both"
    found = packed(sparse(16, 32, 0.5))
    with pytest.raises(KernelError, match="gossamer.prepare it again"):
        CudaExpand.run(torch.zeros(2, 32), found.tensors, found.meta, None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0, 0.05, 0.3, 0.5, 0.9, 1])
@pytest.mark.parametrize("words", [False, True])
def test_expanded(shape: tuple[int, int], density: float, dtype: torch.dtype, words: bool) -> None:
    a = sparse(*shape, density, dtype).cuda()
    a[0, 0] = torch.inf
    found = packed(a, words)
    torch.empty_like(a).fill_(7)  # what the next allocation finds
    assert torch.equal(CudaExpand.unpack(found.tensors, found.meta), a)


@pytest.mark.gpu
def test_rows_of_unequal_density_and_nan() -> None:
    keep = torch.rand(70, 700) < torch.linspace(0, 1, 70).unsqueeze(1)
    a = torch.where(keep, torch.randn(70, 700), 0).bfloat16().cuda()
    a[69, 699] = torch.nan
    found = packed(a)
    assert torch.equal(CudaExpand.unpack(found.tensors, found.meta).view(torch.int16), a.view(torch.int16))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 300])
@pytest.mark.parametrize("words", [False, True])
def test_products_of_the_whole_and_of_parts(tokens: int, words: bool) -> None:
    a, bias = sparse(160, 520, 0.4).cuda(), torch.randn(160).cuda()
    whole, x = packed(a, words), torch.randn(2, tokens, 520, dtype=torch.bfloat16, device="cuda")
    for begin, end in ((0, 160), (32, 96), (96, 160)):
        part = CudaExpand.rows(whole, begin, end)
        expected = x.double() @ a[begin:end].double().mT + bias[begin:end].double()
        for kernel in (CudaExpand, CudaLscd):
            y = kernel.run(x, part.tensors, part.meta, bias[begin:end])
            assert float((y.double() - expected).norm() / expected.norm()) < 4e-3
