"""2:4 layers handed to torch's own sparse tensors."""

import pytest
import torch
from torch import nn

from gossamer import patterns
from gossamer.formats.bitmask import Bitmask
from gossamer.formats.nm24 import NM
from gossamer.hub.semi_structured import to_semi_structured
from gossamer.nn import SparseLinear


def layer(rows: int = 64, cols: int = 64, dtype: torch.dtype = torch.float16) -> SparseLinear:
    a = torch.where(patterns.nm(torch.rand(rows, cols)), torch.randn(rows, cols), 0).to(dtype)
    return SparseLinear.from_format(NM.encode(a), torch.randn(rows).to(dtype))


def test_what_torch_cannot_take_is_named() -> None:
    with pytest.raises(ValueError, match="no 2:4 layer; fix"):
        to_semi_structured(nn.Sequential(SparseLinear.from_format(Bitmask.encode(torch.eye(16)))))
    for bad, message in (
        (layer(dtype=torch.float32), "1 holds torch.float32"),
        (layer(cols=72), "1 is 64 x 72, torch takes multiples of 16"),
        (layer(), "1 is on cpu"),
        (SparseLinear.from_format(NM.encode(torch.eye(16).half(), 1, 4)), "1 is 1:4 sparse"),
    ):
        model = nn.Sequential(nn.Identity(), bad)
        with pytest.raises(ValueError, match=message):
            to_semi_structured(model)
        assert model[1] is bad


@pytest.mark.gpu
def test_the_product_is_the_same() -> None:
    model = nn.Sequential(layer()).cuda()
    x = torch.randn(64, 64, device="cuda", dtype=torch.float16)
    expected = model(x)
    made = to_semi_structured(model)
    assert isinstance(made[0], nn.Linear)  # type: ignore[index]
    assert torch.allclose(made(x), expected, rtol=1e-2, atol=1e-2)
