"""GPU encode and decode of bitmasks against the format on the CPU, bit for bit."""

import pytest
import torch
from torch import Tensor

from gossamer import cuda_bitmask, nn, nvrtc
from gossamer.formats.bitmask import Bitmask

UNSIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = sorted(cuda_bitmask.DTYPES, key=str)
SHAPES = [(1, 1), (3, 7), (5, 8), (16, 1024), (7, 1025), (9, 2056), (33, 4093), (1, 70001), (2000, 3), (0, 5), (5, 0)]


def bits_of(x: Tensor) -> Tensor:
    return x.contiguous().view(UNSIGNED[x.itemsize])


def random_bits(rows: int, cols: int, density: float, dtype: torch.dtype) -> Tensor:
    """Any bit pattern at all, NaN, Inf and -0.0 included."""
    unsigned = UNSIGNED[dtype.itemsize]
    raw = torch.randint(0, 256, (rows, cols * dtype.itemsize), dtype=torch.uint8)
    bits = raw.view(unsigned) if raw.numel() else torch.zeros(rows, cols, dtype=unsigned)
    bits = torch.where(torch.rand(rows, cols) < density, bits, 0)
    if dtype.is_floating_point and bits.numel():
        negative = torch.tensor(-0.0).to(dtype).view(bits.dtype)
        bits = torch.where(torch.rand(rows, cols) < 0.05, negative, bits)
    return bits.view(dtype)


def check(here: Tensor, there: Tensor) -> None:
    """`here` and `there` are one matrix on two devices."""
    one, other = Bitmask.encode(here), Bitmask.encode(there)
    assert one.spec() == other.spec()
    assert torch.equal(one.mask, other.mask.cpu())
    assert torch.equal(bits_of(one.weight), bits_of(other.weight).cpu())
    assert torch.equal(bits_of(one.decode()), bits_of(other.decode()).cpu())


def test_the_cpu_is_not_for_these() -> None:
    assert not cuda_bitmask.runs_on(torch.zeros(2, 2))


@pytest.mark.gpu
def test_they_run_here() -> None:
    assert nvrtc.refusal(torch.device("cuda")) is None
    assert cuda_bitmask.runs_on(torch.zeros(2, 2, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0, 0.1, 0.5, 1])
def test_same_bits(shape: tuple[int, int], dtype: torch.dtype, density: float) -> None:
    a = random_bits(*shape, density, dtype)
    check(a, a.cuda())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_strided(dtype: torch.dtype) -> None:
    a = random_bits(70, 3000, 0.5, dtype)
    b = a.cuda()
    for view in (
        lambda x: x[:, :2048],
        lambda x: x[:, 3:1500],
        lambda x: x[::2],
        lambda x: x.T,
        lambda x: x[:, ::3],
        lambda x: x[5:6],
        lambda x: x[3:, 1:2],
        lambda x: x[:1].expand(9, -1),
    ):
        check(view(a), view(b))


@pytest.mark.gpu
def test_large() -> None:
    a = torch.randn(5000, 4096, device="cuda", dtype=torch.bfloat16)
    a *= torch.rand_like(a) < 0.4
    found = Bitmask.encode(a)
    found.validate()
    assert torch.equal(found.weight, a[a != 0])
    assert torch.equal(found.decode(), a)
    assert found.decode(torch.float32).dtype == torch.float32


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    a = torch.randint(0, 2, (40_000, 65_536), device="cuda", dtype=torch.uint8)
    found = Bitmask.encode(a)
    assert found.weight.numel() == int(a.count_nonzero())
    assert torch.equal(found.decode(), a)


@pytest.mark.gpu
def test_offsets_can_be_kept() -> None:
    a = random_bits(40, 3001, 0.5, torch.bfloat16)
    found = Bitmask.encode(a.cuda())
    offsets = cuda_bitmask.tile_offsets(found.mask, a.shape)
    assert int(offsets[0]) == 0 and int(offsets[-1]) == found.weight.numel()
    dense = cuda_bitmask.unpack_bitmask(found.weight, found.mask, a.shape, offsets=offsets)
    assert torch.equal(bits_of(dense), bits_of(found.decode()))


@pytest.mark.gpu
@pytest.mark.parametrize("cols", [1024, 1023])
def test_a_damaged_mask_reads_nothing_past_the_values(cols: int) -> None:
    values = torch.ones(1000, dtype=torch.bfloat16, device="cuda")
    mask = torch.full((4096, 128), 255, dtype=torch.uint8, device="cuda")
    assert int(cuda_bitmask.unpack_bitmask(values, mask, (4096, cols)).sum(dtype=torch.float32)) <= 1000


@pytest.mark.gpu
def test_graph_capture_and_replay() -> None:
    first, second = (torch.randn(64, 4096, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    keep = torch.rand(64, 4096, device="cuda") < 0.5
    one, other = Bitmask.encode(first * keep), Bitmask.encode(second * keep)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dense = one.decode()
    one.weight.copy_(other.weight)
    graph.replay()
    assert torch.equal(dense, other.decode())


@pytest.mark.gpu
def test_second_stream() -> None:
    a = torch.randn(512, 4096, dtype=torch.bfloat16, device="cuda")
    a *= torch.rand_like(a) < 0.5
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = a * 2
        back = Bitmask.encode(late).decode()
    stream.synchronize()
    assert torch.equal(back, a * 2)


@pytest.mark.gpu
def test_compiled_whole() -> None:
    a = torch.randn(48, 64, device="cuda") * (torch.rand(48, 64, device="cuda") < 0.5)
    layer = nn.SparseLinear.from_format(Bitmask.encode(a))
    x = torch.randn(5, 64, device="cuda")
    y = torch.compile(layer, fullgraph=True)(x)
    torch.testing.assert_close(y, x @ a.T, rtol=1e-4, atol=1e-4)


@pytest.mark.multigpu
def test_two_devices() -> None:
    a = random_bits(33, 4093, 0.5, torch.bfloat16)
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        check(a, a.to(device))
        assert Bitmask.encode(a.to(device)).decode().device == torch.device(device)
