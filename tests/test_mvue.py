"""The Triton kernel of the 2:4 estimate, by Triton's interpreter: on the CPU, in a process of its own."""

import os
import subprocess
import sys

import pytest

# The interpreter is chosen when a kernel is declared, so before the import. Four magnitudes, the same in every column.
SCRIPT = """
import torch
from gossamer.train import mvue

torch.manual_seed(0)
groups, columns = 10, 2000
fours = torch.randn(groups, 4)
fours[0], fours[1] = torch.tensor([0.0, 0, 0, -2]), torch.tensor([0.0, 3, 0, 1])
fours[2], fours[3] = 0.0, torch.tensor([1e-3, 1, 1, 1e-3])
for dtype in (torch.float32, torch.bfloat16):
    g = fours.to(dtype).unsqueeze(-1).expand(-1, -1, columns).contiguous()
    out = torch.full_like(g, torch.nan)
    grid = -(-groups // mvue.ROWS), -(-columns // mvue.COLUMNS)
    mvue._kernel[grid](g, out, torch.tensor([24]), groups, columns, mvue.ROWS, mvue.COLUMNS)
    exact, kept = g.double(), out != 0
    assert int(kept.sum(1).max()) <= 2
    a = exact.abs()
    share = a / a.sum(1, keepdim=True).clamp(min=1e-300)
    odds = share / (1 - share).clamp(min=1e-300)
    chance = torch.where(share == 1, 1.0, share * (1 + odds.sum(1, keepdim=True) - odds))
    expected = torch.where(kept, exact / chance.clamp(min=1e-300), 0.0)
    # Where a GPU rounds to bfloat16 the interpreter cuts off.
    assert torch.allclose(out.double(), expected, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=0)
    spread = (out.double().std(-1) / columns**0.5 + a.mean(-1) * 2**-7).clamp(min=1e-6)
    assert bool(((out.double().mean(-1) - exact.mean(-1)).abs() < 5 * spread).all())
print("right")
"""


def test_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="needs triton, which CPU builds of torch lack; fix: pip install triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.stdout == "right\n", done.stderr
