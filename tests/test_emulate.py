"""int8 in float32: the same numbers that integers give."""

import copy

import pytest
import torch
from torch import nn

from gossamer.emulate import EmulatedInt8, calibrate, emulate, linears, per_tensor, per_token
from gossamer.formats.bsr_int8 import BsrInt8
from gossamer.kernels import _bsr
from gossamer.kernels.cpu_bsr_int8 import CpuBsrInt8
from gossamer.quant import Range
from gossamer.stats import CalibrationError


def test_per_token_rounding_is_symmetric_and_within_half_a_step() -> None:
    x = torch.randn(7, 33) * torch.logspace(-3, 3, 7)[:, None]
    x[3] = 0
    found, step = per_token(x), x.abs().amax(1, keepdim=True) / 127
    assert ((found - x).abs() <= 0.5001 * step).all() and not found[3].any()
    assert torch.equal(per_token(-x), -found)
    levels = (found / step).nan_to_num()
    assert torch.allclose(levels, levels.round(), atol=1e-4) and levels.abs().max() <= 127.001


def test_per_tensor_rounding_is_cut_off_at_both_ends() -> None:
    found = per_tensor(torch.tensor([-9.0, -1.0, 0.0, 0.26, 19.0]), 0.05, 20)
    assert torch.allclose(found, torch.tensor([-1.0, -1.0, 0.0, 0.25, 235 * 0.05]))


@pytest.mark.parametrize("static", [False, True])
def test_a_layer_is_the_integer_product(static: bool) -> None:
    linear, x = nn.Linear(40, 12), torch.randn(2, 5, 40)
    seen = Range()
    seen.observe(x)
    scale, zero = seen.minmax()
    found = EmulatedInt8(linear, (scale, zero) if static else None)(x)
    stored = BsrInt8.encode(linear.weight.detach())
    w = (stored.decode() / stored.scale[:, None]).round().long()
    step = torch.full((2, 5, 1), scale) if static else x.abs().amax(-1, keepdim=True) / 127
    q = (x / step).round().long() + (zero if static else 0)
    q = q.clamp(0, 255) - zero if static else q
    expected = (q @ w.T).float() * step * stored.scale + linear.bias
    assert torch.allclose(found, expected, atol=1e-4)
    assert (found - linear(x)).abs().max() < 0.05


def test_a_model_is_emulated_in_place_and_stays_close(bert) -> None:
    ids = torch.randint(5, 60, (4, 16))
    dense = bert(ids).last_hidden_state
    static = copy.deepcopy(bert)
    ranges = calibrate(static, [{"input_ids": ids}, {"input_ids": ids.flip(0)}])
    assert list(ranges) == linears(bert) and len(ranges) == 12
    assert emulate(static, ranges) is static
    for model in (static, emulate(copy.deepcopy(bert))):
        assert sum(isinstance(m, EmulatedInt8) for m in model.modules()) == 12
        found = model(ids).last_hidden_state
        assert not torch.equal(found, dense)
        assert torch.nn.functional.cosine_similarity(found.flatten(), dense.flatten(), dim=0) > 0.999
    assert "per token" in repr(emulate(copy.deepcopy(bert))) and "zero=" in repr(static)


def test_one_sentence_calibrates_and_none_does_not(bert) -> None:
    assert len(calibrate(bert, [{"input_ids": torch.tensor([[2, 9, 3]])}], how="minmax")) == 12
    with pytest.raises(CalibrationError, match="no activations were observed; fix"):
        calibrate(bert, [])


def test_mistakes_are_named(bert) -> None:
    with pytest.raises(KeyError, match="was not calibrated; fix"):
        emulate(bert, {})
    with pytest.raises(TypeError, match=r"embeddings\.LayerNorm is a LayerNorm; fix"):
        emulate(bert, names=["embeddings.LayerNorm"])
    bert.encoder.layer[1].output.dense.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        emulate(bert)


@pytest.mark.skipif(not _bsr.available(), reason="needs the compiled core")
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_the_kernel_computes_what_is_emulated(tokens: int) -> None:
    linear, x = nn.Linear(96, 40), torch.randn(tokens, 96)
    with torch.no_grad():
        linear.weight *= (torch.rand(10, 96) < 0.3).repeat_interleave(4, 0)
    packed = CpuBsrInt8.pack(BsrInt8.encode(linear.weight.detach()), torch.float32)
    found = CpuBsrInt8.run(x, packed.tensors, packed.meta, linear.bias.detach())
    assert torch.allclose(found, EmulatedInt8(linear)(x), atol=2e-5)
