"""`SparseMatrix`: any sparse matrix in, `A @ B` at the speed of the best kernel for its pattern."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import formats, ops, ops_spmm
from .formats import FormatError
from .formats.csr import CsrFormat
from .machine import free_memory
from .spmm import Csr, Way, sampled
from .spmm.choice import BUCKETS, Chooser
from .work import replacing

PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SUFFIX = ".safetensors"
ROOM = 5  # bytes of working memory per stored byte that packing takes at its peak


@dataclass
class _Side:
    """A or A^T with what chooses for it; `place`: where its entries are among A's, None for A itself."""

    chooser: Chooser
    place: Tensor | None
    version: int  # of A's values, when it was packed


class SparseMatrix:
    """A sparse [M, K] on one device, fixed in its pattern.

    a: a scipy sparse matrix, a torch tensor (CSR, CSC, COO, BSR or dense), the path of a Matrix Market file, or of what
        `save` wrote. Unsorted and duplicate indices and stored zeros are put in order; a wrong index is refused.
    precision: "fp32", "tf32", "fp16" or "bf16", what A's values and B are rounded to; sums are float32 in all of them.
        None: as `a` comes, so that float32 gives float32's accuracy and float64 stays float64.
    device: where it lies; None: where `a` is.
    requires_grad: `values`, a leaf, gets a gradient in every product; then kernels that pack values are left out.
    reorder: may rows be put in another order inside (the result has A's own)? Takes some of the packing time.
    measure: how kernels are chosen when a width of B first comes up. None: predicted, on a GPU then checked against
        what cuSPARSE and a dense product take, in some milliseconds; True: by timing all that promise something;
        False: predicted alone, so that everywhere the same kernel runs. What was measured stays in the cache folder,
        and serves every SparseMatrix of this pattern on this GPU, those of measure=False apart.
    deterministic: two products of the same operands by the same kernel agree to the bit; leaves out some of
        cuSPARSE's algorithms.

    `A @ B`, `A.T @ B` for B [K, N] or [K]: the result has B's dtype, and is differentiable in B. B is used as it lies;
    a copy is made where its rows are not whole multiples of 16 bytes. The first product with a new width picks a kernel
    and packs: do one before capturing a CUDA graph.

    Raises FormatError for what makes no matrix; OutOfMemoryError, before anything is allocated, for what does not fit.
    """

    def __init__(
        self,
        a: Any,
        precision: str | None = None,
        *,
        device: torch.device | str | None = None,
        requires_grad: bool = False,
        reorder: bool = True,
        measure: bool | None = None,
        deterministic: bool = True,
    ) -> None:
        if precision not in (None, *PRECISIONS):
            raise ValueError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}; fix: choose one, or None")
        found, stored = _read(a)
        precision = precision or (stored if stored in PRECISIONS else None)
        wanted = PRECISIONS[precision] if precision else found.dtype if found.dtype.is_floating_point else torch.float32
        _check_room(found, torch.device(device) if device is not None else found.device)
        _warn_of_overflow(found, wanted)
        csr = found.to(device, wanted)
        values = csr.values.detach()
        # A leaf of its own: `a` may be a matrix that lives on.
        self.values = values.clone().requires_grad_() if requires_grad else values
        self.precision, self._reorder, self._measure, self._deterministic = precision, reorder, measure, deterministic
        self._sides: dict[bool, _Side] = {}
        self._csr = Csr(csr.shape, csr.pointers, csr.cols, self.values.detach())
        self._handle = ops_spmm.register(self)

    @property
    def shape(self) -> tuple[int, int]:
        return self._csr.shape

    @property
    def nnz(self) -> int:
        return self._csr.nnz

    @property
    def dtype(self) -> torch.dtype:
        return self._csr.dtype

    @property
    def device(self) -> torch.device:
        return self._csr.device

    @property
    def T(self) -> _Transposed:
        """A^T, sharing everything with A."""
        return _Transposed(self)

    def __repr__(self) -> str:
        m, k = self.shape
        return f"SparseMatrix({m} x {k}, {self.nnz} entries, {self.precision or self.dtype}, {self.device})"

    def __matmul__(self, b: Tensor) -> Tensor:
        return self._product(b, False)

    def mm(self, b: Tensor) -> Tensor:
        """`A @ B`, which torch.compile(fullgraph=True) can read: it takes `@` for a product of two tensors."""
        return self._product(b, False)

    def _product(self, b: Tensor, transposed: bool) -> Tensor:
        inner = self.shape[0 if transposed else 1]
        if not isinstance(b, Tensor):
            raise TypeError(f"B is {type(b).__name__}, not a tensor; fix: torch.as_tensor(B)")
        if b.ndim not in (1, 2) or b.shape[0] != inner:
            raise ValueError(f"B is {tuple(b.shape)}, A takes [{inner}, N] or [{inner}]; fix: reshape it")
        if b.device != self.values.device:
            raise ValueError(f"B is on {b.device}, A on {self.values.device}; fix: B.to(A.device) or A.to(B.device)")
        if not b.is_floating_point():
            raise ValueError(f"B has {b.dtype}, and the result would have it, too; fix: B.float()")
        if ops.differentiated():
            raise NotImplementedError(
                "a SparseMatrix has no derivatives for torch.func or forward mode; fix: use torch.autograd, "
                "or the dense matrix, A.torch().to_dense()"
            )
        flat = b.unsqueeze(1) if b.ndim == 1 else b
        out = torch.ops.gossamer.spmm(self.values, flat.to(self.values.dtype), self._handle, transposed).to(b.dtype)
        return out.squeeze(1) if b.ndim == 1 else out

    def multiply(self, values: Tensor, b: Tensor, transposed: bool) -> Tensor:
        """C [M, N] = A B for these values; what the op calls."""
        side = self._side(transposed)
        changed = None
        if self.values.requires_grad:
            changed = values.detach() if side.place is None else values.detach()[side.place]
        return side.chooser.multiply(b.detach(), changed)

    def sample(self, x: Tensor, y: Tensor) -> Tensor:
        """float32 [nnz]: the entries of x y^T that A stores."""
        return sampled.sddmm(self._csr, x, y)

    def _side(self, transposed: bool) -> _Side:
        # With a gradient, values come along with every product; else what was packed holds them.
        version = 0 if self.values.requires_grad else ops.version(self.values)
        if transposed not in self._sides or self._sides[transposed].version != version:
            csr, place = self._csr.transposed() if transposed else (self._csr, None)
            tf32, changing = self.precision == "tf32", self.values.requires_grad
            chooser = Chooser(csr, tf32, self._reorder, changing, self._measure, self._deterministic)
            self._sides[transposed] = _Side(chooser, place, version)
        return self._sides[transposed]

    def prepare(self, *widths: int, measure: bool = False, transposed: bool = False) -> SparseMatrix:
        """Choose and pack for B of these numbers of columns now; `measure`: by timing, or as timed here before."""
        for n in widths or BUCKETS[:1]:
            self._side(transposed).chooser.prepare(n, measure)
        return self

    def way(self, n: int, transposed: bool = False) -> Way:
        """The kernel and the knobs that a B of n columns gets."""
        return self._side(transposed).chooser.way(n)

    def explain(self, *widths: int) -> str:
        """What was found out about the pattern, and per number of columns what runs and how long that should take."""
        return f"{self!r}\n{self._side(False).chooser.explain(widths or (8, 32, 128, 512))}"

    def to(self, device: torch.device | str) -> SparseMatrix:
        """The same on another device; itself if it is there."""
        if torch.device(device) == self.device:
            return self
        moved = Csr(self.shape, self._csr.pointers, self._csr.cols, self.values.detach())
        return _rebuilt(moved, self.precision, self._settings(), device)

    def torch(self) -> Tensor:
        """As a torch.sparse_csr tensor of the same values."""
        return Csr(self.shape, self._csr.pointers, self._csr.cols, self.values).torch()

    def __reduce__(self) -> tuple:
        parts = Csr(self.shape, self._csr.pointers, self._csr.cols, self.values.detach())
        return _rebuilt, (parts, self.precision, self._settings())

    def _settings(self) -> dict[str, bool | None]:
        return {
            "requires_grad": self.values.requires_grad,
            "reorder": self._reorder,
            "measure": self._measure,
            "deterministic": self._deterministic,
        }

    def save(self, path: str | Path) -> None:
        """One safetensors file of the format `csr`; `SparseMatrix(path)` reads it."""
        from safetensors.torch import save_file

        stored = CsrFormat(self.shape, self.values.detach(), self._csr.cols, self._csr.pointers)
        tensors = {n: t.cpu().contiguous() for n, t in stored.tensors().items()}
        with replacing(Path(path)) as part:
            save_file(tensors, part, {"gossamer": json.dumps(stored.spec() | {"precision": self.precision})})


class _Transposed:
    """A^T of a SparseMatrix."""

    def __init__(self, a: SparseMatrix) -> None:
        self.T = a
        self.shape = a.shape[::-1]

    def __matmul__(self, b: Tensor) -> Tensor:
        return self.T._product(b, True)

    def mm(self, b: Tensor) -> Tensor:
        """`A.T @ B`, which torch.compile(fullgraph=True) can read."""
        return self.T._product(b, True)


def spmm(a: Any, x: Tensor, precision: str | None = None) -> Tensor:
    """`a @ x` for message passing: `a` a SparseMatrix, or a torch.sparse tensor or scipy matrix that stays the same.

    The SparseMatrix of a torch tensor is kept on it, so that the next call finds it.
    """
    if isinstance(a, SparseMatrix):
        return a @ x
    kept = getattr(a, "_gossamer", None)
    if kept is None or kept.precision != precision or kept.device != x.device:
        kept = SparseMatrix(a, precision, device=x.device)
        a._gossamer = kept
    return kept @ x


def _rebuilt(
    parts: Csr, precision: str | None, settings: dict[str, Any], device: torch.device | str | None = None
) -> SparseMatrix:
    return SparseMatrix(parts, precision, device=device, **settings)


def _read(a: Any) -> tuple[Csr, str | None]:
    """The matrix, and the precision that it was saved with."""
    if isinstance(a, Csr):
        return a, None
    if isinstance(a, SparseMatrix):
        return a._csr, None
    if not isinstance(a, (str, Path)):
        return Csr.of(a), None
    if not Path(a).is_file():
        raise FileNotFoundError(f"{a} is no file; fix: give the path of a Matrix Market file, or of what `save` wrote")
    if Path(a).suffix == SUFFIX:
        return _load(Path(a))
    from .spmm import market  # NumPy, which importing Gossamer does not need

    return market.read(a), None


def _load(path: Path) -> tuple[Csr, str | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            spec = (file.metadata() or {}).get("gossamer")
            tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise FormatError(f"{path} is no safetensors file: {error}; fix: write it with SparseMatrix.save") from error
    if spec is None:
        raise FormatError(f"{path} holds no SparseMatrix; fix: write it with SparseMatrix.save")
    try:
        spec = json.loads(spec)
        found = formats.from_spec(spec, tensors)
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path} holds no SparseMatrix ({error!r}); fix: write it with SparseMatrix.save") from error
    found.validate()
    if not isinstance(found, CsrFormat):
        raise FormatError(f"{path} holds the format {found.name}, not csr; fix: write it with SparseMatrix.save")
    return Csr(found.shape, found.rows, found.cols, found.weight), spec.get("precision")


def _warn_of_overflow(a: Csr, dtype: torch.dtype) -> None:
    if dtype != torch.float16 or a.dtype == torch.float16 or not a.nnz:
        return
    finite = a.values[a.values.isfinite()].abs()
    if finite.numel() and float(finite.max()) > torch.finfo(dtype).max:
        warnings.warn(
            f"values up to {float(finite.max()):.3g} become infinite in float16; fix: precision='bf16', or scale them",
            stacklevel=3,
        )


def _check_room(a: Csr, device: torch.device) -> None:
    if device.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise ValueError(f"device '{device}' cannot be used: torch sees no GPU; fix: leave the matrix on the CPU")
    needed = ROOM * (a.nnz * (8 + a.values.element_size()) + 8 * a.shape[0])
    free = free_memory(device)
    if needed > free:
        raise torch.OutOfMemoryError(
            f"this matrix of {a.nnz} entries takes up to {math.ceil(needed / 2**30)} GB to pack, {device} has "
            f"{free / 2**30:.1f} GB free; fix: multiply it in parts, by rows, or leave it on the CPU"
        )
