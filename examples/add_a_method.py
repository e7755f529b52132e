"""A pruning method of your own in one class: keep the weights that are large for their row.

In the tree this is one file, src/gossamer/methods/relative.py, with no other edit. In a package of your own, say
`my_package/relative.py`, name it in pyproject.toml and `gossamer compress --method relative` finds it:

    [project.entry-points."gossamer.methods"]
    relative = "my_package.relative:Relative"
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.methods import Shape
from gossamer.methods._pruning import Pruning
from gossamer.stats import Stats


@dataclass(frozen=True)
class Relative(Pruning):
    """|w| / (mean |w| of its row) ^ `power`: 0 is plain magnitude, 1 prunes every row alike."""

    power: float = 1.0

    name: ClassVar[str] = "relative"
    needs_stats: ClassVar[bool] = False

    def scores(self, weight: Tensor, stats: Stats | None) -> Tensor:
        size = weight.abs()
        return size / size.mean(1, keepdim=True).clamp_min(1e-30) ** self.power


def main() -> float:
    torch.manual_seed(0)
    weight, x = torch.randn(64, 128) * torch.rand(64, 1), torch.randn(512, 128)
    stats = Stats((x.mT @ x).double(), tokens=512)
    shape: Shape = (64, 128)

    method = Relative(power=0.5)
    (found,) = method.fit([weight], stats, ratio=0.3)
    assert [found.nbytes] == method.size([shape], ratio=0.3)  # what the plan promised is what is stored
    error = stats.relative_error(weight, found.decode(torch.float32))
    print(f"{found.nbytes:,} of {2 * weight.numel():,} bytes, {error:.2%} of the output energy lost")
    return error


if __name__ == "__main__":
    main()
