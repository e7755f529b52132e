"""The functions of 2:4 training on an NVIDIA GPU, fused: prune or estimate, and compress for the product, in one pass.

Plain torch in `patterns.py` is the oracle of every one; here a matrix is read once and leaves as cuSPARSELt wants it.
That layout is known for Hopper alone and compared with the library's before the first use; on another GPU, or for sizes
that are no multiples of 64, `prune`, `compressed` and `estimate_t` leave it to the oracle and to the library's own,
slow compression. bfloat16 and float16.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor

from . import cslt, nvrtc
from .patterns import hard24, mvue24, mvue24_exact, soft24

TILE = 64
Kind = Literal["hard", "soft"]
Act = Literal["none", "silu", "gelu_tanh"]
ACTS: dict[str, int] = {"none": 0, "silu": 1, "gelu_tanh": 2}


def _rows(bf16: bool, soft: bool, dense: bool) -> nvrtc.Function:
    return _function("pack24_rows.cuh", "pack24_rows", "PPPPqq", BF16=bf16, SOFT=soft, DENSE=dense)


def _tiles(bf16: bool) -> nvrtc.Function:
    return _function("pack24_tiles.cuh", "pack24_tiles", "PPPPqq", BF16=bf16)


def _search(bf16: bool) -> nvrtc.Function:
    return _function("pack24_tiles.cuh", "search24", "PPqq", BF16=bf16)


def _act(
    entry: str, args: str, bf16: bool, act: int, gated: bool, exact: bool = True, given: bool = False
) -> nvrtc.Function:
    return _function("act24.cuh", entry, args, BF16=bf16, ACT=act, GATED=gated, EXACT=exact, GIVEN=given)


_forward, _back = partial(_act, "act24", "PPqq"), partial(_act, "act24_back", "PPPqq")
_mvue = partial(_act, "mvue24", "PPPPPPqq")


@cache
def _function(file: str, entry: str, args: str, **macros: int) -> nvrtc.Function:
    return nvrtc.Function(file, entry, args, {name: int(value) for name, value in macros.items()})


# For the tests: every entry, every value of every macro. All would take minutes.
VARIANTS = (
    _rows(True, True, True),
    _rows(False, False, False),
    _tiles(True),
    _search(True),
    *(entry(act == 1, act, act == 1) for entry in (_forward, _back, _mvue) for act in (1, 2)),
    _mvue(True, 0, False, True, True),
    _mvue(True, 0, False, False),
)


def refusal(w: Tensor) -> str | None:
    """Why a matrix cannot be compressed in one pass ("it needs ..."), or None if it can."""
    if reason := nvrtc.refusal(w.device) or cslt.refusal(w.device):
        return reason
    if w.dtype not in (torch.bfloat16, torch.float16):
        return "bfloat16 or float16"
    if w.dim() != 2 or any(n % TILE or not n for n in w.shape):
        return f"a matrix whose sizes are multiples of {TILE}"
    if w.data_ptr() % cslt.ALIGNMENT:
        return f"a matrix at an address that is a multiple of {cslt.ALIGNMENT}"
    return None if _layout_known(w.get_device()) else "the layout that cuSPARSELt uses on Hopper"


@cache
def _layout_known(index: int) -> bool:
    """Does cuSPARSELt compress into the layout of cuda/pack24.cuh on this GPU? Tried on a random matrix."""
    if torch.cuda.get_device_capability(index) != (9, 0):
        return False
    generator = torch.Generator(device=f"cuda:{index}").manual_seed(24)
    w = torch.randn(128, 192, device=f"cuda:{index}", generator=generator).bfloat16()
    packed, dense = _prune_rows(w, "hard", None, True)
    assert dense is not None
    return torch.equal(packed, cslt.compress(dense, trusted=True))


def prune(w: Tensor, kind: Kind = "hard", scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(compressed, dense): `w` [M, K] pruned 2:4 along its rows, hard or by S-STE's soft threshold times `scale`.

    The compressed one is a uint8 as `cslt.compress` makes it. `scale`: float32, one element, for "soft".
    """
    packed, dense = _prune(w, kind, scale, True)
    assert dense is not None
    return packed, dense


def compressed(w: Tensor, kind: Kind = "hard", scale: Tensor | None = None) -> Tensor:
    """`prune`, the compressed matrix alone."""
    return _prune(w, kind, scale, False)[0]


def _prune(w: Tensor, kind: Kind, scale: Tensor | None, dense: bool) -> tuple[Tensor, Tensor | None]:
    w = w.detach().contiguous()
    if refusal(w) is None:
        return _prune_rows(w, kind, scale, dense)
    pruned = pruned_reference(w, kind, scale)
    return cslt.compress(pruned, trusted=True), pruned


def pruned_reference(w: Tensor, kind: Kind = "hard", scale: Tensor | None = None) -> Tensor:
    """What `prune` leaves, in plain torch."""
    if kind == "hard":
        return torch.where(hard24(w), w, 0) + 0.0
    soft = soft24(w)
    return soft if scale is None else (soft.float() * scale).to(w.dtype)


def _prune_rows(w: Tensor, kind: Kind, scale: Tensor | None, dense: bool) -> tuple[Tensor, Tensor | None]:
    rows, cols = w.shape
    out, pruned = _packed(rows, cols, w), torch.empty_like(w) if dense else None
    function = _rows(w.dtype == torch.bfloat16, kind == "soft", dense)
    none = nvrtc.null(w.device)
    grid = rows * cols // TILE // TILE, 1, 1
    scale = none if scale is None else scale.float()
    function.launch(grid, (64, 1, 1), w, scale, out, none if pruned is None else pruned, rows, cols)
    return out, pruned


def transposable(w: Tensor) -> Tensor:
    """int16 [M / 4, K / 4]: of each 4 x 4 tile the best mask that is 2:4 both ways, the metadata of its four rows.

    The exact one of `patterns.transposable24`, among equals the first. M and K are multiples of 64.
    """
    _require(w, "transposable")
    w = w.detach().contiguous()
    rows, cols = w.shape
    masks = torch.empty(rows // 4, cols // 4, dtype=torch.int16, device=w.device)
    grid = -(-rows // 4 * cols // 8 // 128), 1, 1
    _search(w.dtype == torch.bfloat16).launch(grid, (128, 1, 1), w, masks, rows, cols)
    return masks


def mask_of(masks: Tensor) -> Tensor:
    """Bool [M, K] of what `transposable` found."""
    rows, cols = masks.shape
    nibbles = (masks.to(torch.int32).unsqueeze(-1) >> torch.arange(0, 16, 4, device=masks.device)) & 15
    columns = torch.arange(4, device=masks.device)
    kept = (columns == (nibbles & 3).unsqueeze(-1)) | (columns == (nibbles >> 2).unsqueeze(-1))
    return kept.permute(0, 2, 1, 3).reshape(4 * rows, 4 * cols)


def compressed_both(w: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """(W, W^T), compressed, of `w` under masks that `transposable` found, then or earlier."""
    _require(w, "compressed_both")
    w = w.detach().contiguous()
    rows, cols = w.shape
    out, out_t = _packed(rows, cols, w), _packed(cols, rows, w)
    grid = cols // TILE, rows // TILE, 1
    _tiles(w.dtype == torch.bfloat16).launch(grid, (128, 1, 1), w, masks, out, out_t, rows, cols)
    return out, out_t


def estimate_t(
    g: Tensor, uniforms: Tensor | None = None, generator: torch.Generator | None = None, exact: bool = True
) -> Tensor:
    """An unbiased 2:4 estimate of g^T, compressed; g [tokens, N]. The compressed twin of `patterns.mvue24_exact(g.mT)`.

    Not `exact`: of `patterns.mvue24`, the papers' approximation, which has more variance and takes longer. `uniforms`:
    float32 [N, tokens / 4, 2] as `patterns.uniforms24` makes them; where None they are drawn in the kernel, from one
    number of the generator.
    """
    g = g.detach().contiguous()
    if refusal(g):
        estimator = mvue24_exact if exact else mvue24
        return cslt.compress(estimator(g.mT.contiguous(), uniforms, generator), trusted=True)
    tokens, wide = g.shape
    out, none = _packed(wide, tokens, g), nvrtc.null(g.device)
    kernel = _mvue(g.dtype == torch.bfloat16, 0, False, exact, uniforms is not None)
    seed = none if uniforms is not None else _seed(g.device, generator)
    given = none if uniforms is None else uniforms.float().contiguous()
    kernel.launch((wide // TILE, tokens // TILE, 1), (64, 1, 1), none, g, none, out, seed, given, tokens, wide)
    return out


def activate(z: Tensor, act: Act, gated: bool) -> Tensor:
    """h [tokens, F] = f(z), or with `gated` f(gate) * up of z [tokens, 2 F] = [gate | up]. F is a multiple of 8."""
    z = _even("activate", z, gated)
    tokens, wide = z.shape[0], z.shape[1] // (1 + gated)
    h = torch.empty(tokens, wide, dtype=z.dtype, device=z.device)
    kernel = _forward(z.dtype == torch.bfloat16, ACTS[act], gated)
    kernel.launch(_grid(tokens, wide), (256, 1, 1), z, h, tokens, wide)
    return h


def activate_backward(
    z: Tensor, dh: Tensor, act: Act, gated: bool, estimate: bool, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor | None]:
    """(dz, an unbiased 2:4 estimate of dz^T, compressed, or None) of `activate`, in one pass.

    z as there, dh [tokens, F]. F is a multiple of 8, for the estimate tokens and F are multiples of 64.
    """
    z, dh = _even("activate_backward", z, gated), _even("activate_backward", dh, False)
    tokens, wide = dh.shape
    if z.shape != (tokens, wide * (1 + gated)) or z.dtype != dh.dtype or z.device != dh.device:
        have = f"z is {z.dtype} {tuple(z.shape)} on {z.device}, dh {dh.dtype} {tuple(dh.shape)} on {dh.device}"
        raise ValueError(f"cuda_patterns.activate_backward: {have}; fix: pass the z that dh is the gradient for")
    if estimate:
        _require(dh, "activate_backward")
    dz = torch.empty_like(z)
    kind = z.dtype == torch.bfloat16, ACTS[act], gated
    if not estimate:
        _back(*kind).launch(_grid(tokens, wide), (256, 1, 1), z, dh, dz, tokens, wide)
        return dz, None
    out, seed, grid = _packed(z.shape[1], tokens, z), _seed(z.device, generator), (wide // TILE, tokens // TILE, 1)
    _mvue(*kind).launch(grid, (64 * (1 + gated), 1, 1), z, dh, dz, out, seed, nvrtc.null(z.device), tokens, wide)
    return dz, out


def _grid(tokens: int, wide: int) -> tuple[int, int, int]:
    return tokens, -(-wide // 2048), 1


def _even(name: str, z: Tensor, gated: bool) -> Tensor:
    """z as the kernels read it, 8 values of a row at once. CsltError where it cannot be."""
    if reason := nvrtc.refusal(z.device):
        raise cslt.CsltError(f"cuda_patterns.{name} needs {reason}; fix: use torch's own functions")
    if z.dim() != 2 or z.dtype not in (torch.bfloat16, torch.float16) or z.shape[1] % (8 * (1 + gated)):
        wanted = f"bfloat16 or float16 [tokens, multiple of {8 * (1 + gated)}], not {z.dtype} {tuple(z.shape)}"
        raise cslt.CsltError(f"cuda_patterns.{name} needs {wanted}; fix: pad it, or use torch's own functions")
    return cslt.aligned(z)


def _require(w: Tensor, name: str) -> None:
    if reason := refusal(w):
        raise cslt.CsltError(f"cuda_patterns.{name} needs {reason}; fix: use patterns.py and cslt.compress")


def _packed(rows: int, cols: int, like: Tensor) -> Tensor:
    """Room for a compressed matrix: 9/8 bytes an entry, as the sizes are multiples of a tile."""
    return torch.empty(rows * cols * 9 // 8, dtype=torch.uint8, device=like.device)


def _seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    return torch.empty(1, dtype=torch.int64, device=device).random_(generator=generator)
