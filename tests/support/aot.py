"""Kernels compiled for GPUs this machine does not have, by any version of Triton.

Every variant is compiled for one target by one version, those that differ in structure for all targets by all
versions: see :func:`places`. A version other than the installed one needs nothing but its wheel, unpacked into
a folder of its own (`make unit` does it); it compiles in a process whose path begins with that folder. What is
known of the machine code comes back as JSON::

    {"triton": version, "seconds": n, "variants": {variant: {target: {fact: value} or {"error": text}}}}

As a script::

    python -m tests.support.aot --output facts.json    # what the Triton of this process compiles
    python -m tests.support.aot --write-registers      # bring registers.json up to date with every version found

Kernels come and go in one place: :func:`variants`.
"""

import argparse
import functools
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from grass_kernels import _triton, adamw_kernel, conversions, prologue, reference, sq_norm, table
from tests.support.oracle import BF16, COMBINATIONS, F16, F32, name
from tests.support.pairwise import pairwise

SUPPORTED = ("3.6.0", "3.7.1", "3.9.0")
"""The oldest, the one that development uses, the newest."""
DEVELOPMENT = SUPPORTED[1]
INSTALLED = importlib.metadata.version("triton") if _triton.INSTALLED else None
ROOT = Path(__file__).resolve().parents[2]
REGISTERS = ROOT / "tests" / "kernels" / "registers.json"
WRITE_REGISTERS = "make registers"

NVIDIA = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
TARGETS = (*NVIDIA, "gfx942")
EVERY_VARIANT_FOR = "sm_90"

ROUNDINGS = ("nearest", "master", "stochastic")
MIXTURES = [
    (dtypes, rounding)
    for dtypes, rounding in product(COMBINATIONS, ROUNDINGS)
    if rounding == "nearest" or dtypes[0] == BF16
]
"""Variants of a call: the dtypes of parameters, gradients and moments, and how parameters are rounded."""


class Variant(NamedTuple):
    """A kernel with its constants chosen, and what its machine code must show."""

    name: str
    kernel: Any
    arguments: dict[str, Any]  # a Triton type for what arrives at run time, any other value for a constant
    threads: int = _triton.THREADS
    max_registers: int | None = None
    reads: Sequence[torch.dtype] = ()  # the arrays of which full blocks are loaded
    writes: Sequence[torch.dtype] = ()  # and stored
    fp32_only: bool = True  # no arithmetic in double, whose functions fuse
    divides: bool = False
    takes_roots: bool = False


def vector_accesses(variant: Variant, arrays: Sequence[torch.dtype], num_bytes: int) -> int:
    """Accesses of a number of bytes that a thread needs for its share of one full block of these arrays.

    All arrays have the width of the widest: 16 bytes of 32-bit dtypes, 8 bytes of 16-bit dtypes beside them, so that
    the values of an element are in one thread.
    """
    width = 16 // max((dtype.itemsize for dtype in variant.reads), default=16)
    per_array = table.BLOCK // _triton.THREADS // width
    return sum(per_array for dtype in arrays if dtype.itemsize * width == num_bytes)


def _adamw(dtypes: tuple[torch.dtype, ...], rounding: str, amsgrad: bool, norms: bool) -> Variant:
    param, grad, moments = dtypes
    states = [moments] * (3 if amsgrad else 2) + [torch.int16] * (rounding == "master")
    return Variant(
        f"adamw {name(dtypes)} {rounding}" + " amsgrad" * amsgrad + " norms" * norms,
        adamw_kernel._masked_adamw_kernel,
        {
            "table_ptr": "*i64",
            "inputs_ptr": "*i64",
            "coefficients_ptr": "*fp32",
            "partials_ptr": "*fp32" if norms else None,
            "chunks_start": "i32",
            **dict.fromkeys(adamw_kernel.SHIFTS, "i64"),
            "PARAM_DTYPE": _triton.tl_dtype(param),
            "GRAD_DTYPE": _triton.tl_dtype(grad),
            "STATE_DTYPE": _triton.tl_dtype(moments),
            "ROUNDING": getattr(adamw_kernel, rounding.upper()).value,
            "AMSGRAD": amsgrad,
            "CHUNK": table.CHUNK,
            "BLOCK": table.BLOCK,
            "NARROW_BLOCK": adamw_kernel.NARROW_BLOCK,
            "WIDTH": conversions.access_width(dtypes),
        },
        max_registers=adamw_kernel.max_registers(moments, amsgrad, norms),
        reads=[param, grad, *states],
        writes=[param, *states],
        divides=True,
        takes_roots=True,
    )


def _layer_sq_norms(dtype: torch.dtype) -> Variant:
    return Variant(
        f"layer_sq_norms {name((dtype,))}",
        sq_norm._layer_sq_norms_kernel,
        {
            "table_ptr": "*i64",
            "inputs_ptr": "*i64",
            "partials_ptr": "*fp32",
            "chunks_start": "i32",
            "GRAD_DTYPE": _triton.tl_dtype(dtype),
            "CHUNK": table.CHUNK,
            "BLOCK": table.BLOCK,
            "WIDTH": conversions.access_width([dtype]),
        },
        reads=[dtype],
    )


def _sum_layers(scaled: bool) -> Variant:
    return Variant(
        "sum_layers" + " grad_scale" * scaled,
        sq_norm._sum_layers_kernel,
        {
            "table_ptr": "*i64",
            "partials_ptr": "*fp32",
            "grad_scale_ptr": "*fp32" if scaled else None,
            "sq_norms_ptr": "*fp32",
            "layers_start": "i32",
            "BLOCK": table.LAYER_BLOCK,
        },
        divides=scaled,
    )


def _prologue(on_device: bool) -> Variant:
    pointers = dict.fromkeys(("found_inf_ptr", "grad_scale_ptr", "clip_coef_ptr", "sq_norms_ptr"), "*fp32")
    pointers["active_ptr"] = "*i1"
    return Variant(
        "prologue" + " on_device" * on_device,
        prologue._prologue_kernel,
        {
            "table_ptr": "*i64",
            "inputs_ptr": "*i64",
            "coefficients_ptr": "*fp32",
            **(pointers if on_device else dict.fromkeys(pointers)),
            "headers_start": "i32",
            "num_layers": "i32",
            "NORM_BLOCK": reference.NORM_BLOCK,
        },
        threads=1,
        fp32_only=False,
    )


@functools.cache
def variants() -> dict[str, Variant]:
    """Every variant, by name. The prologue's arguments are all there or all absent: each is one `if`."""
    made = [
        *(_adamw(*mixture, *flags) for mixture, flags in product(MIXTURES, product((False, True), repeat=2))),
        *(_layer_sq_norms(dtype) for dtype in (F32, BF16, F16)),
        *(_sum_layers(scaled) for scaled in (False, True)),
        *(_prologue(on_device) for on_device in (False, True)),
    ]
    by_name = {variant.name: variant for variant in made}
    assert len(by_name) == len(made)
    return by_name


@functools.cache
def structural_variants() -> frozenset[str]:
    """Names of the variants that all versions compile for all targets.

    They hold every pair of what the code of the AdamW kernel depends on (dtypes, rounding, running maxima, norms), and
    the kernels with most in their registers.
    """
    choices = [(*mixture, *flags) for mixture, flags in product(MIXTURES, product((False, True), repeat=2))]
    flat = pairwise((*dtypes, rounding, *flags) for dtypes, rounding, *flags in choices)
    chosen = [(row[:3], *row[3:]) for row in flat]
    chosen += [((BF16, BF16, BF16), rounding, True, True) for rounding in ROUNDINGS]
    others = [
        name
        for name, variant in variants().items()
        if variant.kernel is not adamw_kernel._masked_adamw_kernel
    ]
    return frozenset([*(_adamw(*choice).name for choice in chosen), *others])


def places(version: str) -> list[tuple[str, str]]:
    """Names of variants and targets that a version compiles."""
    return [
        (variant, target)
        for variant, target in product(variants(), TARGETS)
        if variant in structural_variants() or (version == DEVELOPMENT and target == EVERY_VARIANT_FOR)
    ]


# Compiling: what runs in the process of one version.


def _tool(program: str, *arguments: str) -> str:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return subprocess.run([tools / program, *arguments], capture_output=True, text=True, check=True).stdout


def _compile(variant: Variant, target: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    gpu = GPUTarget("cuda", NVIDIA[target], 32) if target in NVIDIA else GPUTarget("hip", target, 64)
    run_time = {k: v for k, v in variant.arguments.items() if isinstance(v, str)}
    constants = {k: v for k, v in variant.arguments.items() if k not in run_time}
    source = ASTSource(
        fn=variant.kernel,
        signature={**run_time, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
    )
    options = _triton.compile_options(gpu.backend, gpu.warp_size, variant.threads, variant.max_registers)
    return triton.compile(source, target=gpu, options=options)


def _amd_facts(binary: Any) -> dict[str, Any]:
    assembly = binary.asm["amdgcn"]

    def number(field: str) -> int:
        return int(re.search(rf"\.{field}: +(\d+)", assembly)[1])

    accesses = Counter(re.findall(r"\b(?:global|buffer|flat)_((?:load|store)_\w+)", assembly))
    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "local": len(re.findall(r"\bscratch_\w+", assembly)),
        "spills": number("vgpr_spill_count"),
        # Spilled to lanes of vector registers, not to memory: `stack` and `local` would show that.
        "scalar_spills": number("sgpr_spill_count"),
        "loads_128": accesses["load_dwordx4"],
        "stores_128": accesses["store_dwordx4"],
        "inexact": _inexact(binary.asm["llir"], ""),
    }


def _nvidia_facts(binary: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
        disassembly = _tool("nvdisasm", "--no-dataflow", cubin.name)
    ptx = binary.asm["ptx"]
    accesses = Counter(re.findall(r"\b(?:LDG|STG|LDL|STL)[.\w]*", disassembly))

    def resource(name: str) -> int:
        return int(re.search(rf"\b{name}:(\d+)", usage)[1])

    def count(operation: str, width: str = "") -> int:
        return sum(n for name, n in accesses.items() if name.startswith(operation) and width in name)

    return {
        "registers": resource("REG"),
        "stack": resource("STACK"),
        "local": resource("LOCAL"),
        "spills": count("LDL") + count("STL"),
        "loads_128": count("LDG", ".128"),
        "stores_128": count("STG", ".128"),
        "loads_64": len(re.findall(r"\bld\.global\S*\.v2\.b32", ptx)),  # of vectors: addresses are .b64
        "stores_64": len(re.findall(r"\bst\.global\S*\.v2\.b32", ptx)),
        "bf16_conversions": len(re.findall(r"\bcvt\.rn\S*\.bf16x?2?\.f32", ptx)),
        "inexact": _inexact(binary.asm["llir"], ptx),
        "div_rn": ptx.count("div.rn.f32"),
        "sqrt_rn": ptx.count("sqrt.rn.f32"),
    }


def _inexact(llir: str, ptx: str) -> list[str]:
    """Options and instructions by which arithmetic is fused, reordered, approximate or flushes denormals."""
    permissions = [m[1] for m in re.finditer(r"\b(contract|reassoc|arcp|afn|fast)\b.* float", llir)]
    return sorted(
        {*permissions, *re.findall(r"fma\.\S+|mad\.\w+\.f32|\S+\.ftz\S*|\S+\.approx\S*|div\.full\S*", ptx)}
    )


def _facts(variant: str, target: str) -> tuple[str, str, dict[str, Any]]:
    try:
        binary = _compile(variants()[variant], target)
        facts = _nvidia_facts(binary) if target in NVIDIA else _amd_facts(binary)
        return variant, target, {**facts, "shared": binary.metadata.shared}
    except Exception as error:  # one that fails must not hide the others; the test fails on it
        return variant, target, {"error": f"{type(error).__name__}: {error}"}


def compile_all() -> dict[str, Any]:
    """Compile all that is asked of the Triton of this process."""
    import triton

    start = time.perf_counter()
    facts: dict[str, dict[str, Any]] = {}
    workers = min(2, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = [pool.submit(_facts, *place) for place in places(triton.__version__)]
        for task in tasks:
            variant, target, found = task.result()
            facts.setdefault(variant, {})[target] = found
    return {"triton": triton.__version__, "seconds": round(time.perf_counter() - start), "variants": facts}


# Asking for it: what runs in any process.


def folder_of(version: str) -> Path:
    """Where a version that is not installed is unpacked: in the environment's folder, or in GRASS_TRITON_DIRS."""
    return Path(os.environ.get("GRASS_TRITON_DIRS") or sys.prefix) / f"triton-{version}"


def has(version: str) -> bool:
    """True if this machine can compile with a version."""
    return version == INSTALLED or (folder_of(version) / "triton").is_dir()


def compiled_by(version: str, kept: Path) -> dict[str, Any]:
    """Compile all kernels with a version. Kept in the folder `kept` until kernels or this file change."""
    own = [Path(__file__).with_name(f"{module}.py") for module in ("aot", "oracle", "pairwise")]
    sources = [*sorted((ROOT / "grass_kernels").glob("*.py")), *own]
    digest = hashlib.sha256("".join(path.read_text() for path in sources).encode()).hexdigest()[:16]
    found = kept / f"triton-{version}-{digest}.json"
    if found.exists():
        return json.loads(found.read_text())
    facts = _compile_in_a_process(version)
    for outdated in kept.glob(f"triton-{version}-*.json"):
        outdated.unlink()
    if not errors_of(facts):  # which may be the machine's, and gone the next time
        found.write_text(json.dumps(facts))
    return facts


def _compile_in_a_process(version: str) -> dict[str, Any]:
    path = [str(ROOT)] if version == INSTALLED else [str(folder_of(version)), str(ROOT)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join(path)
    with tempfile.TemporaryDirectory() as folder:
        environment["TRITON_CACHE_DIR"] = str(Path(folder) / "cache")
        output = Path(folder) / "facts.json"
        command = [sys.executable, "-m", "tests.support.aot", "--output", str(output)]
        subprocess.run(command, env=environment, cwd=ROOT, check=True)
        facts = json.loads(output.read_text())
    assert facts["triton"] == version, f"{facts['triton']} compiled in place of {version}"
    return facts


def errors_of(facts: dict[str, Any]) -> dict[str, str]:
    """Variants that did not compile, and why."""
    return {
        f"{variant} on {target}": found["error"]
        for variant, of_target in facts["variants"].items()
        for target, found in of_target.items()
        if "error" in found
    }


def registers_of(facts: dict[str, Any]) -> dict[str, dict[str, int | None]]:
    """Registers of each variant by target; None of what did not compile."""
    return {
        variant: {target: found.get("registers") for target, found in of_target.items()}
        for variant, of_target in facts["variants"].items()
    }


def read_registers() -> dict[str, dict[str, dict[str, int]]]:
    """The committed table: by version, variant and target."""
    return json.loads(REGISTERS.read_text())


def write_registers() -> None:
    """Replace what the committed table says of the versions found here; one line a variant, for the diff."""
    registers = read_registers() if REGISTERS.exists() else {}
    with tempfile.TemporaryDirectory() as kept:
        for version in SUPPORTED:
            if has(version):
                facts = compiled_by(version, Path(kept))
                assert not errors_of(facts), errors_of(facts)
                registers[version] = registers_of(facts)
                print(f"triton {version}: {len(places(version))} binaries in {facts['seconds']} s")
            else:
                print(f"triton {version}: not in {folder_of(version)}, its figures are left as they are")
    blocks = [
        f"{json.dumps(version)}: {{\n"
        + ",\n".join(f"{json.dumps(variant)}: {json.dumps(of_target)}" for variant, of_target in of.items())
        + "\n}"
        for version, of in sorted(registers.items())
    ]
    REGISTERS.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


def main() -> None:
    """Run as a script: see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--output", type=Path, help="where to write what the Triton of this process compiles")
    what.add_argument("--write-registers", action="store_true", help=f"update {REGISTERS.name}")
    options = parser.parse_args()
    if options.write_registers:
        write_registers()
    else:
        options.output.write_text(json.dumps(compile_all(), indent=1))


if __name__ == "__main__":
    main()
