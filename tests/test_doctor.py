"""The doctor's report: complete, honest, and with a fix for whatever is wrong."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gossamer import cslt, doctor, native, nvrtc


def by_name() -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.report()}


def test_every_failure_names_a_fix() -> None:
    for check in doctor.report():
        assert check.name and check.detail
        assert check.ok == (check.fix == "")
        assert dataclasses.is_dataclass(check)


def test_what_the_tests_need_is_fine() -> None:
    checks = by_name()
    for name in ("Python", "torch", "safetensors", "native core", "CPU", "memory"):
        assert checks[name].ok, checks[name]
    assert native.isa() in checks["native core"].detail
    assert torch.__version__ in checks["torch"].detail


def test_missing_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_built", None)
    assert not by_name()["native core"].ok
    assert "pip install ." in by_name()["native core"].fix


def test_bad_isa(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise ValueError("GOSSAMER_ISA=sse9")

    monkeypatch.setattr(native, "isa", refuse)
    assert "unset GOSSAMER_ISA" in by_name()["native core"].fix


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-distribution": ("nothing", "one two")})
    assert by_name()["no-such-distribution"].fix == "pip install one two"


def test_old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.4.1+cpu")
    assert "torch>=2.11" in by_name()["torch"].fix


@pytest.mark.parametrize(("major", "ok"), [(9, True), (7, False)])
def test_gpus(monkeypatch: pytest.MonkeyPatch, major: int, ok: bool) -> None:
    found = SimpleNamespace(name="Some GPU", major=major, minor=0, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    checks = by_name()
    assert checks["GPU 0"].ok is checks["GPU 1"].ok is ok
    assert f"sm_{major}0" in checks["GPU 1"].detail


def test_libraries_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(name="Some GPU", major=9, minor=0, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    monkeypatch.setattr(nvrtc, "refusal", lambda device: None)
    monkeypatch.setattr(cslt, "refusal", lambda device: "a working cuSPARSELt: it does not load; fix: pip install it")
    checks = by_name()
    assert checks["NVRTC"] == doctor.Check("NVRTC", True, "compiles the GPU kernels")
    wanted = "needs a working cuSPARSELt: it does not load"
    assert checks["cuSPARSELt"] == doctor.Check("cuSPARSELt", False, wanted, "pip install it")
    monkeypatch.setattr(cslt, "refusal", lambda device: "an NVIDIA GPU")
    assert by_name()["cuSPARSELt"].fix


def test_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "not" / "yet"))
    assert by_name()["cache"].ok and "0 lock files" in by_name()["cache"].detail
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks" / "cpu-1.json").write_text("{}")
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    assert "1 lock files" in by_name()["cache"].detail
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "GOSSAMER_CACHE" in by_name()["cache"].fix


def test_needs_no_terminal_library() -> None:
    code = "import sys; before = set(sys.modules); import gossamer.doctor; print(set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "gossamer.doctor" in done.stdout
    assert "'rich'" not in done.stdout and "'typer'" not in done.stdout
