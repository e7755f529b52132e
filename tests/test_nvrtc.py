"""CUDA sources compiled without a GPU, the cache and the errors; launches where there is a GPU."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer import cslt_library, cusparse, driver, nvrtc

pytest.importorskip("cuda.core", reason="needs the extra: pip install 'gossamer[cuda]'")

SCALE = """
#include "types.cuh"
extern "C" __global__ void scale(const FLOAT* x, FLOAT* y, FLOAT by, i64 n, i32 add) {
  const i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i] * by + add;
}
extern "C" __global__ void reversed(const float* x, float* y, int n) {
  extern __shared__ float held[];
  for (int i = threadIdx.x; i < n; i += blockDim.x) held[n - 1 - i] = x[i];
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = held[i];
}
"""
FLOAT = {"FLOAT": "float"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    nvrtc._warn_once.cache_clear()
    return tmp_path / "cache" / "cuda"


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of device sources of the test's own."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "types.cuh").write_text((nvrtc.SOURCES / "types.cuh").read_text())
    (folder / "scale.cuh").write_text(SCALE)
    monkeypatch.setattr(nvrtc, "SOURCES", folder)
    nvrtc._library.cache_clear()
    yield folder
    nvrtc._library.cache_clear()


def entries(cache: Path) -> list[Path]:
    return [p for p in (cache / "entries").rglob("*") if p.is_file()]


@pytest.mark.parametrize("arch", nvrtc.ARCHS)
def test_every_kernel_compiles_for_every_arch(arch: str) -> None:
    assert nvrtc.compile_all(nvrtc.variants(), [arch]) > 0


def test_every_entry_of_every_source_is_a_variant() -> None:
    listed = {(f.file, f.entry) for f in nvrtc.variants()}
    entry = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^\n]*\)\s+)?(\w+)\(')
    written = {(p.name, e) for p in nvrtc.SOURCES.glob("*.cuh") for e in entry.findall(p.read_text())}
    assert listed == written


@pytest.mark.parametrize("function", nvrtc.variants(), ids=repr)
def test_args_are_those_of_the_source(function: nvrtc.Function) -> None:
    kinds = {"i64": "q", "u64": "Q", "i32": "i", "int": "i", "u32": "I", "float": "f", "TensorMap": "T"}
    listed = re.search(rf"\b{function.entry}\(([^)]*)\) {{", nvrtc.read(function.file))
    assert listed
    found = ["P" if "*" in p else kinds[p.split()[-2]] for p in listed[1].split(",")]
    assert "".join(found) == function.args


def test_the_sources_travel_with_the_package() -> None:
    assert {"types.cuh", "bitmask.cuh"} <= {p.name for p in nvrtc.SOURCES.iterdir()}


def test_includes_are_put_in_place_once(sources: Path) -> None:
    twice = '#include "types.cuh"\n#include "scale.cuh"\n#include "types.cuh"\n__device__ int end;\n'
    (sources / "both.cuh").write_text(twice)
    text = nvrtc.read("both.cuh")
    assert text.count("using u8 =") == 1 and "#include" not in text
    assert text.endswith('#line 4 "both.cuh"\n__device__ int end;\n')
    assert nvrtc.compile("both.cuh", FLOAT, "sm_80").startswith(b"\x7fELF")


def test_an_error_names_file_and_line(sources: Path) -> None:
    (sources / "bad.cuh").write_text('#include "scale.cuh"\n\n__device__ int wrong = missing;\n')
    with pytest.raises(nvrtc.CompileError, match=r'bad.cuh for sm_80: (.|\n)*bad.cuh\(3\): error: .*"missing"'):
        nvrtc.compile("bad.cuh", FLOAT, "sm_80")
    (sources / "scale.cuh").write_text(SCALE.replace("x[i] * by", "x[i] * bye"))
    with pytest.raises(nvrtc.CompileError, match=r'scale.cuh\(5\): error: .*"bye"'):
        nvrtc.compile("bad.cuh", FLOAT, "sm_80")


def test_an_arch_that_nvrtc_does_not_know() -> None:
    with pytest.raises(nvrtc.CompileError, match="sm_999: .*pip install -U nvidia-cuda-nvrtc"):
        nvrtc.compile("bitmask.cuh", {"BYTES": 2, "VEC": 1}, "sm_999")


def test_a_missing_extra_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    nvrtc._core.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"pip install 'gossamer\[cuda\]'"):
            nvrtc.compile("bitmask.cuh", {}, "sm_80")
    finally:
        nvrtc._core.cache_clear()


def test_a_missing_nvrtc_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.pathfinder import DynamicLibNotFoundError

    def program(*_: object, **__: object) -> None:
        raise DynamicLibNotFoundError("no libnvrtc")

    real = nvrtc._core()
    monkeypatch.setattr(nvrtc, "_core", lambda: real._replace(Program=program))
    with pytest.raises(ImportError, match=r"no libnvrtc; fix: pip install 'gossamer\[cuda\]'"):
        nvrtc.compile("bitmask.cuh", {}, "sm_80")


def test_a_missing_driver_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open")

    monkeypatch.setattr(driver.ctypes, "CDLL", absent)
    with pytest.raises(nvrtc.LaunchError, match="install the NVIDIA driver"):
        driver.library.__wrapped__()


def test_torch_for_cuda_without_a_gpu_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `pip install torch` leaves it on a machine that has none."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(driver, "present", driver.present.__wrapped__)
    for library in (nvrtc, cusparse, cslt_library):
        assert library.refusal(torch.device("cuda")) == "an NVIDIA GPU"


def test_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(nvrtc.LaunchError, match="sm_75, kernels of ours need sm_80"):
        nvrtc.arch.__wrapped__(0)
    assert "8.0" in nvrtc._refusal.__wrapped__(0)


@pytest.mark.parametrize(("capability", "name"), [((8, 6), "sm_86"), ((9, 0), "sm_90a"), ((10, 0), "sm_100a")])
def test_arch_names(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert nvrtc.arch.__wrapped__(0) == name


def test_the_cpu_is_refused() -> None:
    assert nvrtc.refusal(torch.device("cpu")) == "an NVIDIA GPU"
    with pytest.raises(nvrtc.LaunchError, match="needs a tensor on a GPU"):
        nvrtc.variants()[0].launch((1, 1, 1), (1, 1, 1), torch.zeros(1))


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nvrtc.cache_folder().name == "cuda"
    monkeypatch.delenv("GOSSAMER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert nvrtc.cache_folder() == Path("/xdg/gossamer/cuda")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert nvrtc.cache_folder() == Path.home() / ".cache/gossamer/cuda"


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    compiled, real = [], nvrtc._compiled
    monkeypatch.setattr(nvrtc, "_compiled", lambda core, s, o: compiled.append(o.arch) or real(core, s, o))
    return compiled


def test_a_binary_is_kept_until_its_source_changes(sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = counted(monkeypatch)
    first = nvrtc.compile("scale.cuh", FLOAT, "sm_80")
    assert nvrtc.compile("scale.cuh", FLOAT, "sm_80") == first and len(compiled) == 1
    nvrtc.compile("scale.cuh", {"FLOAT": "double"}, "sm_80")
    nvrtc.compile("scale.cuh", FLOAT, "sm_89")
    (sources / "types.cuh").write_text((sources / "types.cuh").read_text() + "constexpr int MORE = 1;\n")
    nvrtc.compile("scale.cuh", FLOAT, "sm_80")
    assert len(compiled) == 4 == len(entries(cache))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:-1] + b"!", lambda b: b""])
def test_a_damaged_entry_is_compiled_again(sources: Path, cache: Path, monkeypatch, damage) -> None:
    first = nvrtc.compile("scale.cuh", FLOAT, "sm_80")
    (entry,) = entries(cache)
    kept = entry.read_bytes()
    entry.write_bytes(damage(kept))
    compiled = counted(monkeypatch)
    assert nvrtc.compile("scale.cuh", FLOAT, "sm_80") == first and len(compiled) == 1
    assert entry.read_bytes() == kept


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path: Path, sources: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="set GOSSAMER_CACHE to a folder that is") as said:
        assert nvrtc.compile("scale.cuh", FLOAT, "sm_80").startswith(b"\x7fELF")
        assert nvrtc.compile("scale.cuh", FLOAT, "sm_89").startswith(b"\x7fELF")
    assert len(said) == 1


def test_a_full_disk_is_done_without(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def get(self, key: bytes) -> None:
            return None

        def __setitem__(self, key: bytes, value: bytes) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(nvrtc, "_disk", lambda folder: Full())
    with pytest.warns(UserWarning, match="No space left on device; every process compiles them again"):
        assert nvrtc.compile("scale.cuh", FLOAT, "sm_80").startswith(b"\x7fELF")


def test_processes_that_compile_the_same_at_once(cache: Path) -> None:
    code = "from gossamer import nvrtc\nprint(len(nvrtc.compile('bitmask.cuh', {'BYTES': 2, 'VEC': 8}, 'sm_80')))"
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sizes = {run.communicate()[0] for run in runs}
    assert len(sizes) == 1 and all(run.returncode == 0 for run in runs)
    assert len(entries(cache)) == 1


def test_pointers_come_first() -> None:
    with pytest.raises(ValueError, match="'PiP', pointers must come first"):
        nvrtc.Function("scale.cuh", "scale", "PiP")


@pytest.mark.parametrize("built", [True, False])
def test_a_launch_hands_the_driver_what_it_was_given(monkeypatch: pytest.MonkeyPatch, built: bool) -> None:
    """Through the native module, and without it through ctypes; the driver is a function of ours."""
    ct, seen = driver.ctypes, []
    numbers = [ct.c_uint] * 7
    kinds = {"P": ct.c_uint64, "i": ct.c_int32, "I": ct.c_uint32, "q": ct.c_int64, "Q": ct.c_uint64}
    kinds |= {"f": ct.c_float, "d": ct.c_double, "T": ct.c_uint8 * 128}

    @ct.CFUNCTYPE(ct.c_int, ct.c_void_p, *numbers, ct.c_void_p, ct.POINTER(ct.c_void_p), ct.c_void_p)
    def entry(function: int, *args: Any) -> int:
        *sizes, stream, table, extra = args
        found = [kinds[kind].from_address(table[i]) for i, kind in enumerate("PPiTIqQfd")]
        values = [bytes(v) if isinstance(v, ct.Array) else v.value for v in found]
        seen.append((function, sizes, stream, values, extra))
        return 7

    class Driver:
        cuLaunchKernel = entry

    monkeypatch.setattr(driver, "library", Driver)
    monkeypatch.setattr(driver.native, "available", lambda: built)
    high = 0x7FFF_1234_5678_9AB0  # an address that no 32-bit argument holds
    values = [high, 2**64 - 16, -(2**31), bytes(range(128)), 2**32 - 1, -(2**63), 2**64 - 1, 0.5, 0.1]
    launch = driver.launcher.__wrapped__()
    assert launch(high + 16, "PPiTIqQfd", high + 32, 98304, (65535, 2, 3), (128, 4, 5), *values) == 7
    assert seen == [(high + 16, [65535, 2, 3, 128, 4, 5, 98304], high + 32, values, None)]
    for kind, value in ("i", 2**31), ("I", -1), ("q", 2**63), ("P", 0.5), ("T", 1):
        with pytest.raises((RuntimeError, driver.struct.error)):  # nanobind's bad cast is a RuntimeError
            launch(high, kind, 0, 0, (1, 1, 1), (1, 1, 1), value)
    with pytest.raises(ValueError):
        launch(high, "ii", 0, 0, (1, 1, 1), (1, 1, 1), 1)
    assert len(seen) == 1


def test_a_gpu_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        def cuGetErrorString(self, error: int, text: object) -> int:
            return 0

    monkeypatch.setattr(driver, "library", Driver)
    monkeypatch.setattr(driver, "launcher", lambda: lambda *_: 46)  # CUDA_ERROR_DEVICE_UNAVAILABLE
    monkeypatch.setattr(nvrtc, "_current_device", lambda: -1)
    monkeypatch.setattr(nvrtc, "_current_stream", lambda device: 0)
    function = nvrtc.Function("scale.cuh", "scale", "P")
    function._handles[-1] = 1
    with pytest.raises(nvrtc.LaunchError, match="CUDA error 46, .*fix: start a new process"):
        function.launch((1, 1, 1), (1, 1, 1), torch.zeros(1))


def scale(*, args: str = "PPfqi") -> nvrtc.Function:
    return nvrtc.Function("scale.cuh", "scale", args, FLOAT)


def scaled(function: nvrtc.Function, x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    function.launch((-(-x.numel() // 128), 1, 1), (128, 1, 1), x, y, 0.5, x.numel(), 3)
    return y


@pytest.mark.gpu
def test_launch(sources: Path) -> None:
    x = torch.randn(1000, device="cuda")
    assert torch.equal(scaled(scale(), x), x * 0.5 + 3)


@pytest.mark.gpu
def test_wrong_args_are_found_before_the_launch(sources: Path) -> None:
    with pytest.raises(nvrtc.LaunchError, match="parameters of"):
        scaled(scale(args="PPfii"), torch.randn(10, device="cuda"))


@pytest.mark.gpu
def test_a_grid_that_is_too_large(sources: Path) -> None:
    x = torch.randn(10, device="cuda")
    with pytest.raises(nvrtc.LaunchError, match="fix: the grid, block or shared memory"):
        scale().launch((1, 1, 1), (2048, 1, 1), x, x, 1.0, 10, 0)


@pytest.mark.gpu
def test_shared_memory_above_48_kb(sources: Path) -> None:
    n = 20000
    function = nvrtc.Function("scale.cuh", "reversed", "PPi", FLOAT, shared=4 * n)
    x = torch.randn(n, device="cuda")
    y = torch.empty_like(x)
    function.launch((1, 1, 1), (256, 1, 1), x, y, n, shared=4 * n)
    assert torch.equal(y, x.flip(0))


@pytest.mark.gpu
def test_first_launch_inside_a_capture(sources: Path) -> None:
    function, x, y = scale(), torch.randn(100, device="cuda"), torch.empty(100, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function.launch((1, 1, 1), (128, 1, 1), x, y, 2.0, 100, 1)
    x.normal_()
    graph.replay()
    torch.testing.assert_close(y, x * 2 + 1)


@pytest.mark.gpu
def test_current_stream(sources: Path) -> None:
    function, stream = scale(), torch.cuda.Stream()
    scaled(function, torch.zeros(1, device="cuda"))
    x = torch.zeros(1 << 20, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(4)
        y = scaled(function, x)
    stream.synchronize()
    assert bool((y == 5).all())


@pytest.mark.gpu
def test_threads_of_which_some_have_not_touched_the_gpu(sources: Path) -> None:
    function, wrong = scale(), []
    xs = torch.arange(64, device="cuda").float()[:, None].expand(64, 300).contiguous()
    ys = torch.empty_like(xs)
    torch.cuda.synchronize()

    def work(i: int) -> None:
        try:
            for _ in range(50):
                function.launch((3, 1, 1), (128, 1, 1), xs[i], ys[i], 0.5, 300, i)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert not wrong
    assert torch.equal(ys, xs * 1.5)


@pytest.mark.multigpu
def test_two_devices(sources: Path) -> None:
    function = scale()
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        x = torch.randn(1000, device=device)
        y = scaled(function, x)
        assert y.device == x.device and torch.equal(y, x * 0.5 + 3)
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_a_launch_after_a_kernel_that_failed(cache: Path) -> None:
    # In a process of its own: the context does not survive.
    code = (
        "import torch; from gossamer import nvrtc\n"
        "x = torch.zeros(8, device='cuda')\n"
        "count = next(f for f in nvrtc.variants() if f.entry == 'count')\n"
        "count.launch((1 << 18, 1, 1), (128, 1, 1), x, x, 1, 1 << 40)\n"
        "try: torch.cuda.synchronize()\n"
        "except RuntimeError: pass\n"
        "try: count.launch((1, 1, 1), (128, 1, 1), x, x, 1, 8)\n"
        "except nvrtc.LaunchError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert "fix: start a new process" in run.stdout, run.stderr
