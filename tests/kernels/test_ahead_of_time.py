"""Every kernel compiled for GPUs this machine does not have, and what came out read.

Would catch: a kernel that the interpreter runs and the compiler refuses; single-element accesses where full
blocks should move 128 bits at a time; registers spilled to memory; a multiplication and an addition fused;
approximate roots and divisions; a kernel specialised on a number that changes between calls.
"""

import re
import subprocess
from collections import Counter
from itertools import product
from pathlib import Path

import pytest

from grass_kernels import _triton, adamw_kernel, prologue, reference, sq_norm, table

from .oracle import BF16, F16, F32, name

triton = pytest.importorskip("triton", reason="no Triton on this platform")
if _triton.INTERPRETING:
    pytest.skip("compiles for GPUs: run without TRITON_INTERPRET", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

NVIDIA = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
TARGETS = [*NVIDIA, "gfx942"]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Three programs of 256 threads share an NVIDIA multiprocessor's registers up to here, five an AMD one's.
MAX_REGISTERS = {"sm_80": 80, "sm_90": 80, "sm_100": 80, "gfx942": 96}
COMBINATIONS = [(F32, F32, F32), (BF16, BF16, F32), (F16, F16, F32), (BF16, F32, F32), (BF16, BF16, BF16)]


def compiled(kernel, target: str, arguments: dict, threads: int = _triton.THREADS, max_registers=None):
    """`arguments`: a Triton type for what arrives at run time, any other value for what is constant."""
    gpu = GPUTarget("hip", target, 64) if target == "gfx942" else GPUTarget("cuda", NVIDIA[target], 32)
    run_time = {k: v for k, v in arguments.items() if isinstance(v, str)}
    constants = {k: v for k, v in arguments.items() if k not in run_time}
    source = ASTSource(
        fn=kernel, signature={**run_time, **dict.fromkeys(constants, "constexpr")}, constexprs=constants
    )
    options = _triton.compile_options(gpu.backend, gpu.warp_size, threads, max_registers)
    return triton.compile(source, target=gpu, options=options)


def adamw_arguments(dtypes, **changes):
    return {
        "table_ptr": "*i64",
        "inputs_ptr": "*i64",
        "coefficients_ptr": "*fp32",
        "partials_ptr": "*fp32",
        "chunks_start": "i32",
        **dict(zip(("PARAM_DTYPE", "GRAD_DTYPE", "STATE_DTYPE"), map(_triton.tl_dtype, dtypes), strict=True)),
        "ROUNDING": 0,
        "AMSGRAD": False,
        "CHUNK": table.CHUNK,
        "BLOCK": table.BLOCK,
        "NARROW_BLOCK": adamw_kernel.NARROW_BLOCK,
        **changes,
    }


def norm_arguments(dtype):
    return {
        "table_ptr": "*i64",
        "inputs_ptr": "*i64",
        "partials_ptr": "*fp32",
        "chunks_start": "i32",
        "GRAD_DTYPE": _triton.tl_dtype(dtype),
        "CHUNK": table.CHUNK,
        "BLOCK": table.BLOCK,
    }


def wide_accesses(dtypes) -> int:
    """128-bit accesses a thread needs for its share of one full block, an array of each dtype."""
    return sum(table.BLOCK // _triton.THREADS * dtype.itemsize // 16 for dtype in dtypes)


def tool(program: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / program, *arguments], capture_output=True, text=True, check=True).stdout


def assert_no_local_memory(binary, target: str, tmp_path: Path) -> Counter:
    """Registers stay registers. Returns how often each memory instruction occurs."""
    if target == "gfx942":
        assembly = binary.asm["amdgcn"]
        assert re.search(r"\.vgpr_spill_count: 0\b", assembly)
        assert re.search(r"\.private_segment_fixed_size: 0\b", assembly)
        assert "scratch_" not in assembly
        assert int(re.search(r"\.vgpr_count: +(\d+)", assembly)[1]) <= MAX_REGISTERS[target]
        return Counter(re.findall(r"\b(?:global|buffer)_((?:load|store)_\w+)", assembly))
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    usage = tool("cuobjdump", "--dump-resource-usage", str(cubin))
    registers, stack, local = (
        int(re.search(rf"\b{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL")
    )
    assert (stack, local) == (0, 0)
    assert registers <= MAX_REGISTERS[target]
    sass = Counter(re.findall(r"\b(?:LDG|STG|LDL|STL)[.\w]*", tool("nvdisasm", str(cubin))))
    assert not [i for i in sass if i.startswith(("LDL", "STL"))]
    return sass


def assert_rounds_as_written(binary, target: str) -> None:
    assert not re.search(r"\b(contract|reassoc|arcp|fast)\b.* float", binary.asm["llir"])
    if target in NVIDIA:
        ptx = binary.asm["ptx"]
        assert not re.search(r"fma\.|mad\.\w+\.f32|\.ftz|\.approx|div\.full", ptx)


def wide(counts: Counter, target: str) -> tuple[int, int]:
    """How many 128-bit loads and stores there are."""
    if target == "gfx942":
        return counts["load_dwordx4"], counts["store_dwordx4"]
    return tuple(
        sum(n for i, n in counts.items() if i.startswith(op) and ".128" in i) for op in ("LDG", "STG")
    )


def check_adamw(target, dtypes, tmp_path, **changes):
    param, grad, state = dtypes
    moments = [state] * (3 if changes.get("AMSGRAD") else 2)
    binary = compiled(
        adamw_kernel._masked_adamw_kernel,
        target,
        adamw_arguments(dtypes, **changes),
        max_registers=adamw_kernel.MAX_REGISTERS,
    )
    counts = assert_no_local_memory(binary, target, tmp_path)
    loads, stores = wide(counts, target)
    assert loads >= wide_accesses([param, grad, *moments])
    assert stores >= wide_accesses([param, *moments])
    assert_rounds_as_written(binary, target)
    if target in NVIDIA:
        assert "div.rn.f32" in binary.asm["ptx"]
        assert "sqrt.rn.f32" in binary.asm["ptx"]


@pytest.mark.parametrize(
    ("target", "dtypes"),
    list(product(TARGETS, COMBINATIONS)),
    ids=lambda x: x if isinstance(x, str) else name(x),
)
def test_adamw(target, dtypes, tmp_path):
    check_adamw(target, dtypes, tmp_path)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "changes",
    [{"partials_ptr": None}, {"AMSGRAD": True}, {"ROUNDING": 1}, {"ROUNDING": 2}],
    ids=["no norms", "amsgrad", "master", "stochastic"],
)
def test_adamw_variants(target, changes, tmp_path):
    check_adamw(target, (BF16, BF16, F32), tmp_path, **changes)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=lambda d: name((d,)))
def test_layer_sq_norms(target, dtype, tmp_path):
    binary = compiled(sq_norm._layer_sq_norms_kernel, target, norm_arguments(dtype))
    loads, _ = wide(assert_no_local_memory(binary, target, tmp_path), target)
    assert loads >= wide_accesses([dtype])
    assert_rounds_as_written(binary, target)


@pytest.mark.parametrize("target", TARGETS)
def test_sum_layers(target, tmp_path):
    arguments = {
        "table_ptr": "*i64",
        "partials_ptr": "*fp32",
        "grad_scale_ptr": "*fp32",
        "sq_norms_ptr": "*fp32",
        "layers_start": "i32",
    }
    binary = compiled(sq_norm._sum_layers_kernel, target, {**arguments, "BLOCK": table.LAYER_BLOCK})
    assert_no_local_memory(binary, target, tmp_path)
    assert_rounds_as_written(binary, target)


@pytest.mark.parametrize("on_device", [True, False], ids=["all on the device", "all on the host"])
@pytest.mark.parametrize("target", TARGETS)
def test_prologue(target, on_device, tmp_path):
    pointers = dict.fromkeys(("found_inf_ptr", "grad_scale_ptr", "clip_coef_ptr", "sq_norms_ptr"), "*fp32")
    pointers["active_ptr"] = "*i1"
    arguments = {"table_ptr": "*i64", "inputs_ptr": "*i64", "coefficients_ptr": "*fp32"}
    arguments |= {"headers_start": "i32", "num_layers": "i32", "NORM_BLOCK": reference.NORM_BLOCK}
    arguments |= pointers if on_device else dict.fromkeys(pointers)
    binary = compiled(prologue._prologue_kernel, target, arguments, threads=1)
    assert_no_local_memory(binary, target, tmp_path)


@pytest.mark.parametrize(
    ("kernel", "changing"),
    [
        (prologue._prologue_kernel, "headers_start num_layers"),
        (adamw_kernel._masked_adamw_kernel, "chunks_start"),
        (sq_norm._layer_sq_norms_kernel, "chunks_start"),
        (sq_norm._sum_layers_kernel, "layers_start"),
    ],
)
def test_changing_numbers_are_not_specialised(kernel, changing):
    """A kernel specialised on them would be compiled again in the middle of training."""
    numbers = [p for p in kernel.params if not p.is_constexpr and not p.name.endswith("_ptr")]
    assert [p.name for p in numbers] == changing.split()
    assert all(p.do_not_specialize for p in numbers)
