"""The kernel's source with each compiler found: g++ and clang++, with and without OpenMP, for old and new CPUs."""

import ctypes
import platform
import shutil
import subprocess

import pytest
import torch

from timm_halonet.ops import native
from timm_halonet.ops.options import Options

from ..support import fuzz_op
from ..unit.test_native import _check, _inputs, _options, _sample
from ..unit.test_native_nonfinite import CASES, INPUTS, _assert_same_places
from ..unit.test_native_nonfinite import _inputs as _small_inputs

FLAGS = "-std=c++20 -O3 -fno-math-errno -fno-trapping-math -fPIC -shared -Wall -Werror -Wno-ignored-attributes"


@pytest.fixture(scope="module", params=["g++", "clang++"])
def compiler(request):
    if shutil.which(request.param) is None:
        pytest.skip(f"no {request.param}")
    return request.param


@pytest.fixture(
    scope="module",
    params=[("native", True), ("native", False), ("x86-64-v3", True), ("x86-64", True), ("x86-64", False)],
    ids=lambda x: f"{x[0]}-{'openmp' if x[1] else 'one_thread'}",
)
def library(request, compiler, tmp_path_factory):
    arch, openmp = request.param
    if arch != "native" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("flags are for x86-64")
    if arch == "x86-64-v3" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("the CPU has no AVX2")
    if openmp:  # not installed with every clang
        empty = tmp_path_factory.mktemp("openmp") / "empty.cpp"
        empty.write_text("int main() {}")
        if subprocess.run([compiler, "-fopenmp", empty, "-o", empty.with_suffix("")], capture_output=True).returncode:
            pytest.skip(f"{compiler} has no OpenMP")
    path = tmp_path_factory.mktemp("kernel") / "kernel.so"
    source = native.__file__.replace("native.py", "native.cpp")
    openmp_flag = "-fopenmp" if openmp else "-Wno-unknown-pragmas"
    command = [compiler, *FLAGS.split(), f"-march={arch}", openmp_flag, source, "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(path))


@pytest.mark.integration
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_compiler(library, dtype, monkeypatch):
    monkeypatch.setattr(native, "_library", lambda: library)
    for size, blocks, dims, flags in _sample()[::5]:
        inputs, grad = _inputs(size, blocks, dims, dtype)
        _check(inputs, grad, _options(blocks, dims, flags))
    for size, blocks in CASES:
        for name in INPUTS:
            inputs = _small_inputs(size, blocks, dtype)
            inputs[INPUTS.index(name)].view(-1)[-1] = float("nan")
            _assert_same_places(inputs, Options(*blocks, 0.4, False, True, blocks[2]))


@pytest.mark.integration
def test_the_fuzz_on_every_compiler(library, monkeypatch):
    monkeypatch.setattr(native, "_library", lambda: library)
    tally = fuzz_op.fuzz(60, seed=2, backends=["native"])
    assert not tally.failures, "\n".join(tally.failures)
    assert sum(tally.cases.values()) == 60
