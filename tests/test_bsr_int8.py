"""bsr_int8: the format, its kernels on every instruction set against exact sums, epilogues, the drop-in layer."""

import gc
import itertools
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import gossamer
from gossamer.activation import Activation, Epilogue, elements
from gossamer.formats import FormatError, from_spec
from gossamer.formats.bsr_int8 import BsrInt8
from gossamer.kernels import Case, KernelError, Packed, _bsr
from gossamer.kernels.cpu_amx_int8 import CpuAmxInt8
from gossamer.kernels.cpu_bsr_int8 import CpuBsrInt8
from gossamer.nn import SparseLinear

ISAS = [*_bsr.isas(), *(["amx"] if _bsr.amx() else [])]
BLOCKS = [(4, 1), (4, 4)]
SHAPES = [(1, 1), (4, 4), (3, 7), (16, 64), (17, 129), (33, 70), (40, 513), (100, 96), (5, 9001)]
TOKENS = [1, 2, 4, 5, 16, 17, 32, 33, 48, 64, 65, 100, 200]
FUNCTIONS: dict[str, Any] = {
    "none": lambda v: v,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "silu": F.silu,
}


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before, threads = _bsr.isa(), torch.get_num_threads()
    yield
    _bsr.set_isa(before)
    torch.set_num_threads(threads)


def weight(shape: tuple[int, int], density: float, block: tuple[int, int], seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    (m, k), (r, c) = shape, block
    keep = torch.rand(-(-m // r), -(-k // c), generator=g) < density
    return torch.randn(shape, generator=g) * keep.repeat_interleave(r, 0).repeat_interleave(c, 1)[:m, :k]


def some(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(a: BsrInt8, isa: str) -> Packed:
    """Packed for an instruction set, which is used from now on."""
    _bsr.set_isa(isa if isa != "amx" else _bsr.isas()[0])
    return _bsr.pack(a, panels=isa == "amx")


def integers(a: BsrInt8) -> Tensor:
    """The stored weights before their scales, float64 [M, K]."""
    ones = torch.where(a.scale > 0, 1.0, 0.0)
    return BsrInt8(a.shape, a.weight, a.mask, ones, a.width).decode(torch.float64)


def product(x: Activation, a: BsrInt8, to: Epilogue) -> Tensor:
    """float64 [tokens, M] before it is rounded to anything."""
    sums = (x.matrix().double() - x.zero) @ integers(a).T
    scale = x.scale.double().unsqueeze(1) if isinstance(x.scale, Tensor) else x.scale
    y = sums * scale * a.scale.double()
    y = y if to.bias is None else y + to.bias.double()
    if isinstance(to.residual, Activation):
        y = y + to.residual.dequantise().double()
    elif to.residual is not None:
        y = y + to.residual.double()
    return FUNCTIONS[to.function](y)


def check(found: Tensor | Activation, want: Tensor, to: Epilogue) -> None:
    slack = 2e-6 * want.abs().amax().clamp_min(1e-3) if want.numel() else torch.tensor(1.0)
    if isinstance(found, Tensor):
        assert found.dtype == to.dtype
        rounding = want.abs() * 2**-8 if to.dtype == torch.bfloat16 else 0
        assert ((found.double() - want).abs() <= slack + rounding).all()
    elif to.dtype == torch.float32:
        assert ((found.matrix().double() - want).abs() <= slack).all()
    else:
        low, high = (0, 255) if to.dtype == torch.uint8 else (-128, 127)
        exact = (want / to.scale + to.zero).clamp(low, high)
        assert ((found.matrix().double() - exact).abs() <= 0.5 + slack / to.scale).all()


# ---- the format ----


@given(
    st.integers(0, 40), st.integers(0, 90), st.floats(0, 1), st.sampled_from(BLOCKS),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]), st.integers(0, 2**31),
    st.sampled_from([1e-42, 1e-30, 1.0, 1e30]),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_rounds_within_its_bound_and_only_once(
    m: int, k: int, density: float, block: tuple[int, int], dtype: torch.dtype, seed: int, level: float
) -> None:
    a = (weight((m, k), density, block, seed) * level).to(dtype).nan_to_num(posinf=0, neginf=0)
    one = BsrInt8.encode(a, block)
    one.validate()
    assert one.decode().dtype == dtype
    bound = one.scale.double().clamp_min(2.0**-126).unsqueeze(1) * 0.501
    assert ((one.decode(torch.float64) - a.double()).abs() <= bound).all()
    for wide in (torch.float32, torch.float64):
        two = BsrInt8.encode(one.decode(wide), block)
        assert all(torch.equal(t, two.tensors()[n]) for n, t in one.tensors().items())
    assert one.nbytes == BsrInt8.size((m, k), len(one.weight), block[1])


def test_bytes_per_weight() -> None:
    keep = torch.zeros(64, 1000).index_fill_(1, torch.arange(0, 1000, 5), 1.0)
    a = BsrInt8.encode(keep * (1 + torch.rand(64, 1000)))
    assert a.nbytes / a.shape[0] / a.shape[1] == pytest.approx(0.2 + 1 / 32 + 0.004, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_refused(bad: float) -> None:
    a = torch.ones(8, 8)
    a[3, 4] = bad
    for same in (a, a.to_sparse()):
        with pytest.raises(FormatError, match="finite weights only"):
            BsrInt8.encode(same)
    with pytest.raises(FormatError, match="have no scale"):
        BsrInt8.encode(torch.full((4, 4), 1e300, dtype=torch.float64))


def test_unknown_blocks_are_refused() -> None:
    with pytest.raises(FormatError, match=r"\(4, 1\) or \(4, 4\), not \(1, 4\)"):
        BsrInt8.encode(torch.ones(4, 4), (1, 4))


def test_a_weight_that_is_not_block_sparse_is_stored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    a = weight((64, 64), 0.3, (1, 1))
    with caplog.at_level(logging.WARNING, "gossamer"):
        found = BsrInt8.encode(a)
    share, covered = 100 * (found.decode() != 0).float().mean(), 100 * found.used().float().mean()
    assert f"{share:.0f} % of it is not zero, but its blocks cover {covered:.0f} %" in caplog.text
    assert 25 < share < 35 and covered > 70 and "prune whole blocks" in caplog.text
    assert (found.decode() - a).abs().max() < 0.02
    caplog.clear()
    BsrInt8.encode(weight((64, 64), 0.3, (4, 1)))
    assert not caplog.text


def test_damage_is_found() -> None:
    good = BsrInt8.encode(weight((18, 30), 0.5, (4, 4)), (4, 4))
    good.validate()

    def damaged(**changed: Tensor) -> BsrInt8:
        found = from_spec(good.spec(), {n: t.clone() for n, t in good.tensors().items()} | changed)
        assert isinstance(found, BsrInt8)
        return found

    mask = good.mask.clone()
    mask[0, 0] ^= 1
    with pytest.raises(FormatError, match=r"blocks: damaged; fix: fetch the file again"):
        damaged(mask=mask).validate()
    with pytest.raises(KernelError, match="contradict each other"):
        _bsr.pack(damaged(mask=mask))
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(FormatError, match="negative, NaN or Inf"):
            damaged(scale=torch.full((18,), bad)).validate()
    with pytest.raises(FormatError, match="beyond the last row or column"):
        damaged(weight=torch.ones_like(good.weight)).validate()


# ---- products ----


@pytest.mark.parametrize("shape", [(2, 300, 1000), (601, 1001), (1 << 19,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_outputs_begin_with_a_page(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    y = _bsr.room(shape, dtype)
    assert y.shape == shape and y.dtype == dtype and y.is_contiguous() and not y._is_view()
    assert y.data_ptr() % 4096 == 0 or y.nbytes < 1 << 21
    assert y.fill_(3).double().sum() == 3 * y.numel()


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_is_the_same_bits_on_every_instruction_set(shape: tuple[int, int], block: tuple[int, int]) -> None:
    for i, tokens in enumerate(TOKENS):
        a = BsrInt8.encode(weight(shape, [0.0, 0.3, 1.0, 0.1, 0.6][i % 5], block, i), block)
        x, bias = some(tokens, shape[1], seed=i), some(shape[0]) if i % 2 else None
        q = _bsr.quantise(x, "rows")
        want = product(q, a, Epilogue(bias=bias))
        first: Tensor | None = None
        for isa in ISAS:
            p = packed(a, isa)
            y = _bsr.linear(x, p.tensors, p.meta, bias)
            check(y, want, Epilogue())
            first = y if first is None else first
            assert torch.equal(y, first), isa


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_epilogue(isa: str, block: tuple[int, int]) -> None:
    m, k = 45, 70
    a = BsrInt8.encode(weight((m, k), 0.4, block), block)
    p, bias = packed(a, isa), some(m)
    for tokens in (3, 16, 30, 64, 130):
        x, residual = some(tokens, k), some(tokens, m, seed=5)
        blocked = Activation(_to_t(residual), "t", tokens, m)
        kinds = [
            *(("rows", d, r) for d in (torch.float32, torch.bfloat16) for r in (None, residual, residual.bfloat16())),
            *(("rows", d, r) for d in (torch.uint8, torch.int8) for r in (None, residual)),
            *(("t", d, r) for d in (torch.uint8, torch.int8, torch.float32) for r in (None, blocked)),
            *(("q", d, None) for d in (torch.uint8, torch.int8)),
        ]
        for i, (layout, dtype, other) in enumerate(kinds):
            for j, function in enumerate(FUNCTIONS):
                scale, at = (0.02, 100 + i) if j % 2 else (None, 128)
                own = _bsr.quantise(x, p.meta["layout"], scale, at)
                zero = 0 if dtype.is_floating_point else 120 if dtype == torch.uint8 else -3
                to = Epilogue(dtype, layout, bias if j % 3 else None, other, function, 0.05 if zero else 1.0, zero)  # type: ignore[arg-type]
                check(_bsr.multiply(own, p.tensors, p.meta, to), product(own, a, to), to)
        few = _bsr.quantise(x, "rows", 0.03, 77)
        for dtype in (torch.uint8, torch.int8, torch.float32):
            to = Epilogue(dtype, "rows", bias, None, "silu", 0.04 if dtype != torch.float32 else 1.0, 0)
            check(_bsr.multiply(few, p.tensors, p.meta, to), product(few, a, to), to)


def _to_t(x: Tensor) -> Tensor:
    """float32 [tokens, channels] in the layout t."""
    tokens, channels = x.shape
    data, at = torch.zeros(elements("t", tokens, channels)), 0
    for begin in range(0, tokens, 64):
        part = x[begin : begin + 64]
        wide = 16 if tokens - begin <= 16 else 32 if tokens - begin <= 32 else 64
        data[at : at + wide * channels].view(channels, wide)[:, : len(part)] = part.T
        at += wide * channels
    return data


@pytest.mark.parametrize("isa", ISAS)
def test_layers_in_a_chain_keep_the_layout(isa: str) -> None:
    """Two layers with GELU between, uint8 all the way, against float64 with the same roundings."""
    for block in BLOCKS:
        one, two = (BsrInt8.encode(weight(s, 0.3, block, 7), block) for s in ((96, 50), (50, 96)))
        p, q = packed(one, isa), packed(two, isa)
        x = _bsr.quantise(some(100, 50), p.meta["layout"], 0.03, 128)
        between = Epilogue(torch.uint8, p.meta["layout"], some(96), None, "gelu", 0.1, 10)
        middle = _bsr.multiply(x, p.tensors, p.meta, between)
        assert isinstance(middle, Activation)
        check(middle, product(x, one, between), between)
        last = Epilogue(bias=some(50), residual=some(100, 50, seed=9))
        check(_bsr.multiply(middle, q.tensors, q.meta, last), product(middle, two, last), last)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_extremes_are_exact(isa: str, block: tuple[int, int]) -> None:
    """All weights +-127 by all activations 0 or 255, where saturating arithmetic would show."""
    signs = torch.where(some(20, 260) > 0, 1.0, -1.0)
    signs[3] = 1
    signs[4] = -1
    a = BsrInt8.encode(signs * 127, block)
    p = packed(a, isa)
    assert (a.scale == 1).all()
    for tokens in (2, 16, 64):
        x = torch.where(some(tokens, 260) > 0, 255.0, 0.0)
        x[1] = 255
        for zero in (0, 255):
            q = _bsr.quantise(x - zero, p.meta["layout"], 1.0, zero)
            assert torch.equal(q.matrix().float(), x)
            y = _bsr.multiply(q, p.tensors, p.meta)
            assert isinstance(y, Tensor) and torch.equal(y.double(), (x - zero).double() @ (signs * 127).double().T)


@pytest.mark.parametrize("isa", _bsr.isas())
@pytest.mark.parametrize("layout", ["t", "q", "rows"])
def test_activations_are_rounded_once_and_ties_to_even(isa: str, layout: str) -> None:
    """In float32, 1.4999999 + 128 is 129.5, which would then be rounded up."""
    _bsr.set_isa(isa)
    values = torch.tensor([1.4999999, -1.4999999, 0.5, 1.5, -0.5, -1.5, 0.50000006, 126.4999999, 1e9, -1e9])
    want = torch.tensor([129, 127, 128, 130, 128, 126, 129, 254, 255, 0], dtype=torch.uint8)
    for tokens, times in ((1, 1), (7, 5), (70, 33)):
        x = values.repeat(tokens, times)
        assert torch.equal(_bsr.quantise(x, layout, 1.0).matrix(), want.repeat(tokens, times))
        assert torch.equal(_bsr.quantise(x[:, :8], layout).matrix(), _once(x[:, :8]))


def _once(x: Tensor) -> Tensor:
    """Symmetric per token: the inverse of the scale in float32, the product with it exact."""
    inverse = 127 / x.abs().amax(1, keepdim=True)
    return ((x.double() * inverse.double()).round() + 128).to(torch.uint8)


def test_weights_are_found_again_where_their_memory_is() -> None:
    a = BsrInt8.encode(weight((32, 64), 0.5, (4, 1)))
    p, x = packed(a, _bsr.isas()[0]), some(20, 64)
    want, known = _bsr.linear(x, p.tensors, p.meta, None), len(_bsr._known)
    assert _bsr.weights(p.tensors, p.meta) is _bsr.weights(p.tensors, p.meta)
    for tensor in p.tensors:
        tensor.share_memory_()  # moves it
    assert torch.equal(_bsr.linear(x, p.tensors, p.meta, None), want)
    del p, tensor
    gc.collect()
    assert len(_bsr._known) == known - 1


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [3, 20, 70])
def test_values_out_of_range_saturate(isa: str, tokens: int) -> None:
    a = BsrInt8.encode(weight((24, 40), 1.0, (4, 1)))
    p = packed(a, isa)
    x = some(tokens, 40) * 1e30
    for layout in (p.meta["layout"], "rows"):
        q = _bsr.quantise(x, layout, 1e-3, 128)
        assert torch.equal(q.matrix().int(), torch.where(x > 0, 255, 0).int())
        for dtype, low, high in ((torch.uint8, 0, 255), (torch.int8, -128, 127)):
            y = _bsr.multiply(q, p.tensors, p.meta, Epilogue(dtype, layout, scale=1e-30))
            assert isinstance(y, Activation)
            sums = product(q, a, Epilogue())
            assert torch.equal(y.matrix().int(), torch.where(sums > 0, high, low).int())


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("tokens", [16, 20, 70])
def test_bytes_of_every_magnitude_are_the_same_bits(block: tuple[int, int], tokens: int) -> None:
    """Where sums cannot leave the range of a conversion they are not bounded before it: on both sides of that."""
    a, x, bias = BsrInt8.encode(weight((37, 128), 0.5, block), block), some(tokens, 128), 1e3 * some(37)
    for scale, dtype, layout in itertools.product((1e-12, 1e-6, 1e-5, 1e-3, 1.0), (torch.uint8, torch.int8), "tq"):
        to, want = Epilogue(dtype, layout, bias, scale=scale, zero=3), None
        for isa in reversed(ISAS):
            p = packed(a, isa)
            y = _bsr.multiply(_bsr.quantise(x, p.meta["layout"], 0.02, 100), p.tensors, p.meta, to)
            assert isinstance(y, Activation)
            want = y.matrix() if want is None else want
            assert torch.equal(y.matrix(), want), (isa, scale, dtype, layout)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [3, 20, 70])
def test_a_token_that_is_not_finite_is_nan_and_zeros_are_the_bias(isa: str, tokens: int) -> None:
    a = BsrInt8.encode(weight((24, 40), 0.5, (4, 1)))
    p, bias = packed(a, isa), some(24)
    clean = some(tokens, 40)
    want = _bsr.linear(clean, p.tensors, p.meta, bias)
    quiet, signalling, infinite = 0x7FC00000, 0x7F800001, 0x7F800000
    for bad, place, token in itertools.product((quiet, -1, signalling, infinite, -0x800000), (3, 20, 39), (1, -1)):
        x, expected = clean.clone(), want.clone()
        x[0] = 0
        x.view(torch.int32)[token, place] = bad
        expected[0], expected[token] = bias, math.nan
        y = _bsr.linear(x, p.tensors, p.meta, bias)
        assert torch.equal(y.nan_to_num(12345.0), expected.nan_to_num(12345.0)), (hex(bad), place, token)
    tiny = _bsr.linear(clean * 1e-38, p.tensors, p.meta, bias)
    assert torch.allclose(tiny, bias.expand_as(tiny))


@pytest.mark.skipif(not _bsr.amx(), reason="no AMX")
@pytest.mark.parametrize("density", [0.1, 1.0], ids=["sparse", "dense"])
@pytest.mark.parametrize(
    ("columns", "tokens"),
    [(900, 150), (1000, 300), (1700, 500), (6000, 400), (40, 80), (64, 64), (128, 193), (1700, 90), (3000, 64)],
)
def test_amx_adds_up_slices_and_groups_of_tokens(columns: int, tokens: int, density: float) -> None:
    a = BsrInt8.encode(weight((75, columns), density, (4, 1)))
    x, bias = some(tokens, columns), some(75)
    for to in (Epilogue(bias=bias, scale=0.1), Epilogue(bias=bias, layout="q", dtype=torch.uint8, scale=0.1, zero=9)):
        found = {}
        for isa in ("amx", "avx512"):
            p = packed(a, isa)
            y = _bsr.multiply(_bsr.quantise(x, _bsr.layout_of(p.meta, tokens), 0.03), p.tensors, p.meta, to)
            found[isa] = y if isinstance(y, Tensor) else y.matrix()
        assert torch.equal(found["amx"], found["avx512"])


@pytest.mark.parametrize("isa", ISAS)
def test_rows_of_zeros(isa: str) -> None:
    dense = weight((30, 50), 0.5, (4, 1))
    dense[:9], dense[20] = 0, 0
    a = BsrInt8.encode(dense)
    assert (a.scale[:9] == 0).all()
    p, bias = packed(a, isa), some(30)
    for tokens in (2, 40):
        y = _bsr.linear(some(tokens, 50), p.tensors, p.meta, bias)
        assert torch.equal(y[:, :9], bias[:9].expand(tokens, -1)) and torch.equal(y[:, 20], bias[20].expand(tokens))


def test_bits_do_not_depend_on_threads() -> None:
    for isa in ISAS:
        for block in BLOCKS:
            dense = weight((1000, 256), 0.2, block)
            dense[:100] = weight((100, 256), 1.0, block)  # rows of uneven cost
            p = packed(BsrInt8.encode(dense, block), isa)
            for tokens in (1, 5, 64, 200, 600):
                x, found = some(tokens, 256), []
                for threads in (1, 2, 3, 7):
                    torch.set_num_threads(threads)
                    found.append(_bsr.linear(x, p.tensors, p.meta, None))
                assert all(torch.equal(y, found[0]) for y in found), (isa, tokens)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_and_leading_dimensions(isa: str, dtype: torch.dtype) -> None:
    a = BsrInt8.encode(weight((40, 99), 0.5, (4, 1)))
    p = packed(a, isa)
    wide = some(200, 300).to(dtype)
    for x in (wide[::2, :99], wide[:70, 5:104], wide[:3, ::3][:, :99], wide[:66, :99], wide[:1, :99].expand(5, -1)):
        want = _bsr.linear(x.contiguous(), p.tensors, p.meta, None)
        assert want.dtype == dtype and torch.equal(_bsr.linear(x, p.tensors, p.meta, None), want)
    for shape in ((99,), (0, 99), (3, 0, 99), (2, 3, 99)):
        y = _bsr.linear(some(*shape).to(dtype), p.tensors, p.meta, some(40).to(dtype))
        assert y.shape == (*shape[:-1], 40) and y.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_empty_matrices(shape: tuple[int, int]) -> None:
    for isa in ISAS:
        p = packed(BsrInt8.encode(torch.zeros(shape)), isa)
        for tokens in (1, 70):
            y = _bsr.linear(some(tokens, shape[1]), p.tensors, p.meta, torch.ones(shape[0]))
            assert torch.equal(y, torch.ones(tokens, shape[0]))


def test_misuse_is_refused_with_the_fix() -> None:
    p = _bsr.pack(BsrInt8.encode(weight((8, 12), 0.5, (4, 1))))
    with pytest.raises(ValueError, match="x has 11 features in its last dimension; fix: pass the 12 that"):
        _bsr.linear(some(2, 11), p.tensors, p.meta, None)
    with pytest.raises(ValueError, match=r"scale is positive and finite, not 0\.0; fix: calibrate"):
        _bsr.quantise(some(2, 12), "t", 0.0)
    with pytest.raises(KernelError, match=r"not torch\.uint8 in 'q'; fix: give the layer before"):
        _bsr.multiply(_bsr.quantise(some(9, 12), "q"), p.tensors, p.meta)
    x = _bsr.quantise(some(9, 12), "t")
    for bad, match in (
        (Epilogue(torch.uint8, "t", scale=0.0), "output scale is positive"),
        (Epilogue(torch.bfloat16, "t"), "no output of"),
        (Epilogue(bias=some(7)), "a bias has 8 entries"),
        (Epilogue(function="tanh"), "unknown function 'tanh'; fix: choose one of none, relu"),  # type: ignore[arg-type]
        (Epilogue(residual=some(9, 7)), r"float32 or bfloat16 \[9, 8\]"),
        (Epilogue(torch.uint8, "t", residual=some(9, 8)), "residual of an output in rows"),
    ):
        with pytest.raises(KernelError, match=match):
            _bsr.multiply(x, p.tensors, p.meta, bad)
    for short in (Activation(x.data[:-1], "t", 9, 12, x.scale, 128), Activation(x.data, "t", 9, 12, some(8), 128)):
        with pytest.raises(KernelError, match="9 x 12 in 't' has 192 entries"):
            _bsr.multiply(short, p.tensors, p.meta)
    with pytest.raises(ValueError, match="choose one of: .*scalar"):
        _bsr.set_isa("mmx")


def test_refusals_name_what_is_needed() -> None:
    def case(dtype: torch.dtype, cols: int = 64) -> Case:
        spec = {"format": "bsr_int8", "shape": [8, cols], "dtype": "float32"}
        return Case(spec, torch.device("cpu"), dtype, 1)

    assert CpuBsrInt8.refuses(case(torch.float32)) is None
    assert "float32 or bfloat16" in str(CpuBsrInt8.refuses(case(torch.float16)))
    assert "65536 inputs" in str(CpuBsrInt8.refuses(case(torch.float32, 65_537)))
    assert (CpuAmxInt8.refuses(case(torch.float32)) is None) == _bsr.amx()


def test_the_longest_sums_do_not_overflow() -> None:
    a = BsrInt8.encode(torch.ones(4, _bsr.MOST) * 127)
    for isa in ISAS:
        p = packed(a, isa)
        x = torch.full((17, _bsr.MOST), 255.0)
        y = _bsr.multiply(_bsr.quantise(x, p.meta["layout"], 1.0, 0), p.tensors, p.meta)
        assert isinstance(y, Tensor) and (y == torch.tensor(255 * 127 * _bsr.MOST).float()).all()


# ---- the drop-in layer ----


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_prepare_runs_the_layer_near_the_reference(tmp_path: Any, block: tuple[int, int]) -> None:
    a = BsrInt8.encode(weight((320, 256), 0.2, block), block)
    model = torch.nn.Sequential(SparseLinear.from_format(a, some(320)))
    x = some(3, 40, 256)
    want = model(x)
    for kernel in ("cpu_bsr_int8", *(["cpu_amx_int8"] if _bsr.amx() else [])):
        gossamer.prepare(model, tokens=(1, 64), dtype=torch.float32, kernel=kernel, lock=tmp_path / "lock.json")
        assert kernel in str(model[0].layout)
        for y in (model(x), torch.compile(model, backend="eager", fullgraph=True)(x)):
            assert (y - want).norm() / want.norm() < 0.02
    gossamer.prepare(model, tokens=(1, 64), dtype=torch.float32, lock=tmp_path / "lock.json")
    assert (model(x) - want).norm() / want.norm() < 0.02
    assert model[0](some(0, 256)).shape == (0, 320)


def test_survives_a_checkpoint(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    a = BsrInt8.encode(weight((20, 33), 0.4, (4, 4)).bfloat16(), (4, 4))
    save_file(a.tensors(), tmp_path / "a.safetensors")
    again = from_spec(a.spec(), load_file(tmp_path / "a.safetensors"))
    again.validate()
    assert torch.equal(again.decode(), a.decode()) and again.decode().dtype == torch.bfloat16


def test_stub_names_what_the_core_has() -> None:
    stub = Path(gossamer.__file__).with_name("_bsr.pyi")
    lines = [line for line in stub.read_text().splitlines() if line.startswith(("def ", "class "))]
    declared = {line.split("(")[0].split(":")[0].removeprefix("def ").removeprefix("class ") for line in lines}
    assert declared == {name for name in dir(_bsr.require()) if not name.startswith("_")}


def test_a_prepared_layer_gives_the_bits_of_the_kernel(tmp_path: Path) -> None:
    a = BsrInt8.encode(torch.randn(24, 40) * (torch.rand(6, 1, 40) < 0.3).expand(6, 4, 40).reshape(24, 40))
    layer = SparseLinear.from_format(a, torch.randn(24).bfloat16())
    x = torch.randn(2, 9, 40)
    gossamer.prepare(layer, tokens=(1, 32), kernel="cpu_bsr_int8", dtype=torch.float32, lock=tmp_path / "lock.json")
    packed = CpuBsrInt8.pack(a, torch.float32)
    with torch.no_grad():
        for part in (x, x[:1, :1], x.mT.contiguous().mT, x[:0]):
            assert torch.equal(layer(part), CpuBsrInt8.run(part, packed.tensors, packed.meta, layer.bias))
        assert layer.bias is not None
        layer.bias.mul_(2)
        assert torch.equal(layer(x), CpuBsrInt8.run(x, packed.tensors, packed.meta, layer.bias))
        with pytest.raises(ValueError, match="x lies on meta"):
            layer(x.to("meta"))
