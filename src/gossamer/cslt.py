"""cuSPARSELt, NVIDIA's products with a 2:4 matrix, through ctypes: plans, workspaces and algorithms kept.

torch's own operator builds and destroys descriptors and plan on every call, 0.5 to 1 ms of the host's time; a kept plan
costs a few microseconds. Which algorithm to take is what `cslt_search.py` finds out. Call it from inside an op:
torch.compile cannot trace it.
"""

from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native
from .cslt_library import CsltError, Struct, call, check, handle, library, refusal
from .patterns import is_24

TYPES = {torch.float32: 0, torch.float16: 2, torch.int8: 3, torch.bfloat16: 14, torch.float8_e4m3fn: 28}
INTEGER, FLOAT = 0, 2  # cusparseComputeType
PLAIN, TRANSPOSED = 0, 1  # cusparseOperation_t
COLUMNS, ROWS = 1, 2  # cusparseOrder_t
BIAS = 8  # cusparseLtMatmulDescAttribute_t
CONFIG, CONFIGS = 0, 1  # cusparseLtMatmulAlgAttribute_t
ALIGNMENT = 16  # bytes, of every matrix
DESTROY = "MatDescriptorDestroy"
MAX_PLANS = 1024


class Problem(NamedTuple):
    """D [rows, columns] = A [rows, depth] B [depth, columns] with A 2:4 along its rows and compressed.

    `b_rows`: B lies as [columns, depth], row after row, as activations do, else as [depth, columns]; `d_rows`: D as
    [columns, rows], else as [rows, columns]. `bias`: one is added to every row of D.
    """

    rows: int
    depth: int
    columns: int
    dtype: torch.dtype
    out: torch.dtype
    b_rows: bool = True
    d_rows: bool = True
    bias: int = 0  # address of [rows] values in `out`, or 0

    def refuses(self) -> str | None:
        """Why the library has no such product ("it needs ..."), or None."""
        if self.dtype not in TYPES or self.dtype == torch.float32:
            return "operands in bfloat16, float16, float8_e4m3fn or int8"
        wide = multiple(self.dtype)
        if self.rows % wide or self.depth % wide:
            return f"a sparse matrix whose sizes are multiples of {wide}, not {self.rows} x {self.depth}"
        if self.columns % (wide // 2):
            return f"a multiple of {wide // 2} columns on the right, not {self.columns}"
        return None


class Algorithm(NamedTuple):
    """One of the library's ways to compute a product, by its number there."""

    config: int


def multiple(dtype: torch.dtype) -> int:
    """Both sizes of a sparse matrix must be multiples of this, a dense operand's of half of it."""
    return 32 // dtype.itemsize


class Plan:
    """A product that the library is ready to run, by one algorithm on one GPU."""

    def __init__(self, problem: Problem, algorithm: Algorithm, index: int) -> None:
        if reason := problem.refuses():
            raise CsltError(f"cuSPARSELt needs {reason}; fix: run it dense, or pad the matrix")
        self.problem, self.algorithm, self._handle = problem, algorithm, handle(index)
        self._a, self._b, self._d, self._product, self._choice, self._plan = (Struct() for _ in range(6))
        with torch.cuda.device(index):
            self._describe(problem)
            self._select(algorithm)
            self._plan.fill("MatmulPlanInit", "MatmulPlanDestroy", self._handle, self._product.at, self._choice.at)
            size = ctypes.c_size_t()
            call("MatmulGetWorkspace", self._handle, self._plan.at, ctypes.byref(size))
        self.workspace = size.value
        self._index = index
        self._run = _runner(self._handle, self._plan.at)

    def _describe(self, p: Problem) -> None:
        sparse = p.rows, p.depth, p.depth, ALIGNMENT, TYPES[p.dtype], ROWS
        self._a.fill("StructuredDescriptorInit", DESTROY, self._handle, *sparse, 0)
        right = (p.columns, p.depth) if p.b_rows else (p.depth, p.columns)
        dense = "DenseDescriptorInit", DESTROY, self._handle
        self._b.fill(*dense, *right, right[1], ALIGNMENT, TYPES[p.dtype], ROWS)
        lead, order = (p.rows, COLUMNS) if p.d_rows else (p.columns, ROWS)
        self._d.fill(*dense, p.rows, p.columns, lead, ALIGNMENT, TYPES[p.out], order)
        compute = INTEGER if p.dtype == torch.int8 else FLOAT
        operands = self._a.at, self._b.at, self._d.at, self._d.at
        op = TRANSPOSED if p.b_rows else PLAIN
        call("MatmulDescriptorInit", self._handle, self._product.at, PLAIN, op, *operands, compute)
        if p.bias:
            self._attribute(BIAS, ctypes.c_void_p(p.bias))

    def _attribute(self, name: int, value: Any) -> None:
        size = ctypes.sizeof(value)
        call("MatmulDescSetAttribute", self._handle, self._product.at, name, ctypes.byref(value), size)

    def _select(self, algorithm: Algorithm) -> None:
        self._choice.fill("MatmulAlgSelectionInit", "MatmulAlgSelectionDestroy", self._handle, self._product.at, 0)
        number = ctypes.c_int(algorithm.config)
        call("MatmulAlgSetAttribute", self._handle, self._choice.at, CONFIG, ctypes.byref(number), 4)

    def configs(self) -> int:
        """How many there are to choose from."""
        found = ctypes.c_int()
        call("MatmulAlgGetAttribute", self._handle, self._choice.at, CONFIGS, ctypes.byref(found), 4)
        return found.value

    def run(self, a: Tensor, b: Tensor, d: Tensor, alpha: float = 1.0) -> Tensor:
        """Writes alpha D to `d` on torch's current stream; `a` as `compress` leaves it.

        Shapes are the caller's business. `alpha` is the host's: the library reads it while it enqueues.
        """
        if _current_device() != self._index:
            with torch.cuda.device(self._index):
                return self.run(a, b, d, alpha)
        numbers = _ONE if alpha == 1.0 else (ctypes.c_float * 2)(alpha, 0.0)
        stream = _stream(self._index)
        space = _space(self._index, stream, self.workspace) if self.workspace else 0
        if status := self._run(ctypes.addressof(numbers), a.data_ptr(), b.data_ptr(), d.data_ptr(), space, stream):
            check(status, f"cusparseLtMatmul of {self.problem}")
        return d

    def bind(self, a: Tensor, shape: Sequence[int]) -> Callable[[Tensor], Tensor]:
        """`run` as a function of B, which must lie on this plan's GPU and at an aligned address; D gets this shape."""
        index, size, dtype, run = self._index, self.workspace, self.problem.out, self._run
        shape, strides, one = tuple(shape), torch.empty(shape, device="meta").stride(), ctypes.addressof(_ONE)

        def product(b: Tensor) -> Tensor:
            if _current_device() != index:
                with torch.cuda.device(index):
                    return product(b)
            d, stream = _empty(shape, strides, dtype), _stream(index)
            space = _space(index, stream, size) if size else 0
            if status := run(one, a.data_ptr(), b.data_ptr(), d.data_ptr(), space, stream):
                check(status, f"cusparseLtMatmul of {self.problem}")
            return d

        return product


_ONE = (ctypes.c_float * 2)(1.0, 0.0)  # alpha and beta
_spaces: dict[tuple[int, int], tuple[int, Tensor]] = {}  # bytes and workspace, by GPU and stream


def _space(index: int, stream: int, size: int) -> int:
    """The address of a workspace on the current GPU: one per stream, whose launches follow each other; a graph gets its
    own."""
    if _capturing():
        return torch.empty(size, dtype=torch.uint8, device="cuda").data_ptr()
    found = _spaces.get((index, stream))
    if found is None or found[0] < size:
        found = _spaces[index, stream] = size, torch.empty(size, dtype=torch.uint8, device="cuda")
    return found[1].data_ptr()


def _runner(handle: int, plan: int) -> Callable[[int, int, int, int, int, int], int]:
    """(alpha and beta, A, B, D, workspace, stream) -> status of the product of a plan, all of them addresses."""
    matmul = library().cusparseLtMatmul
    if native.available():
        at = ctypes.cast(matmul, ctypes.c_void_p).value
        return partial(native.require().cslt_matmul, at, handle, plan)

    def run(numbers: int, a: int, b: int, d: int, space: int, stream: int) -> int:
        streams = ctypes.c_void_p(stream)
        return matmul(handle, plan, numbers, a, b, numbers + 4, d, d, space, ctypes.addressof(streams), 1)

    return run


# What torch's own generated code calls; a build without CUDA lacks them.
_current_device = getattr(torch._C, "_cuda_getDevice", None) or torch.cuda.current_device
_capturing = getattr(torch._C, "_cuda_isCurrentStreamCapturing", None) or torch.cuda.is_current_stream_capturing
_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda device: torch.cuda.current_stream(device).cuda_stream
)
_empty = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None) or (  # pyright: ignore[reportAttributeAccessIssue]
    lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device="cuda")
)


_plans: OrderedDict[tuple[Problem, Algorithm, int], Plan] = OrderedDict()
_lock = threading.Lock()


def plan(problem: Problem, algorithm: Algorithm, index: int) -> Plan:
    """The plan for these, made once; CsltError if the library has none. The oldest of many are dropped."""
    key = problem, algorithm, index
    if found := _plans.get(key):
        return found
    with _lock:
        found = _plans[key] = Plan(problem, algorithm, index)
        if len(_plans) > MAX_PLANS:
            _plans.popitem(last=False)
    return found


@cache
def _sizes(rows: int, depth: int, dtype: torch.dtype, index: int) -> tuple[Struct, int, int]:
    """The description of a sparse matrix, its bytes compressed, and those that compressing takes besides."""
    described, sizes = Struct(), (ctypes.c_size_t * 2)()
    shape = rows, depth, depth, ALIGNMENT, TYPES[dtype], ROWS
    described.fill("StructuredDescriptorInit", DESTROY, handle(index), *shape, 0)
    first = ctypes.addressof(sizes)
    call("SpMMACompressedSize2", handle(index), described.at, first, first + ctypes.sizeof(ctypes.c_size_t))
    return described, sizes[0], sizes[1]


def compress(a: Tensor, trusted: bool = False) -> Tensor:
    """uint8: a contiguous 2:4 matrix [rows, depth] on a GPU in the library's own layout, which it does not document.

    ValueError if it is not 2:4; -0.0 among zeros is a zero. `trusted`: it is 2:4 and has no -0.0, for sure: nothing is
    looked at, nothing waits for the GPU, and what is not so loses values.
    """
    if reason := refusal(a.device) or Problem(a.shape[0], a.shape[1], 16, a.dtype, a.dtype).refuses():
        raise CsltError(f"cuSPARSELt needs {reason}; fix: run it dense, or pad the matrix")
    if not a.is_contiguous() or a.data_ptr() % ALIGNMENT:
        raise CsltError("cslt.compress takes a contiguous matrix at an aligned address; fix: pass a.clone()")
    a = a if trusted else checked(a)
    index = a.get_device()
    described, size, extra = _sizes(a.shape[0], a.shape[1], a.dtype, index)
    out, space = (torch.empty(n, dtype=torch.uint8, device=a.device) for n in (size, extra))
    where = a.data_ptr(), out.data_ptr(), space.data_ptr(), _stream(index)
    call("SpMMACompress2", handle(index), described.at, 1, PLAIN, *where)
    return out


def checked(a: Tensor) -> Tensor:
    """A 2:4 matrix without -0.0, which the library takes for a value; ValueError if it is none. Waits for the GPU."""
    bits = a.detach().view(torch.int8 if a.itemsize == 1 else torch.int16)  # torch compares no 8-bit floats
    kept = (bits & torch.iinfo(bits.dtype).max if a.is_floating_point() else bits) != 0
    if not is_24(kept):
        raise ValueError("cslt.compress takes a 2:4 matrix; fix: prune it, torch.where(patterns.hard24(a), a, 0)")
    return torch.where(kept, bits, 0).view(a.dtype)


def aligned(b: Tensor) -> Tensor:
    """`b`, or a copy, contiguous and at an address that the library takes."""
    b = b.contiguous()
    return b if b.data_ptr() % ALIGNMENT == 0 else b.clone()


def matmul(a: Tensor, problem: Problem, b: Tensor, algorithm: Algorithm, alpha: float = 1.0) -> Tensor:
    """alpha D of a problem, a new tensor; `a` as `compress` leaves it, `b` as the problem says it lies, `aligned`.

    ValueError where they are not of this problem: the library would read whatever lies behind them.
    """
    if reason := _unlike(a, problem, b):
        raise ValueError(f"cslt.matmul of {problem} takes {reason}")
    shape = (problem.columns, problem.rows) if problem.d_rows else (problem.rows, problem.columns)
    d = b.new_empty(shape, dtype=problem.out)
    return plan(problem, algorithm, b.get_device()).run(a, b, d, alpha)


def _unlike(a: Tensor, p: Problem, b: Tensor) -> str | None:
    """What of the operands is not the problem's, and the fix; None if all is."""
    right = (p.columns, p.depth) if p.b_rows else (p.depth, p.columns)
    if tuple(b.shape) != right or b.dtype != p.dtype:
        return f"{p.dtype} {right} on the right, not {b.dtype} {tuple(b.shape)}; fix: pass that, or state its problem"
    if not b.is_contiguous() or b.data_ptr() % ALIGNMENT:
        return "a contiguous right operand at an aligned address; fix: pass cslt.aligned(b)"
    if a.device != b.device or not b.is_cuda:
        return f"both operands on one GPU, not on {a.device} and {b.device}; fix: move one of them"
    size = _sizes(p.rows, p.depth, p.dtype, b.get_device())[1]
    if a.dtype != torch.uint8 or a.numel() != size or not a.is_contiguous():
        return f"{size} bytes of cslt.compress on the left, not {a.dtype} {tuple(a.shape)}; fix: compress that matrix"
    return None
