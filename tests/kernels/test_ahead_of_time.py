"""Every kernel compiled for GPUs this machine does not have, by the oldest and the newest Triton too, and
what came out read. Not every variant for every GPU by every version: see `tests.support.aot.places`.

Would catch: a kernel that the interpreter runs and a compiler refuses; single-element accesses where full
blocks should move 128 bits at a time; registers spilled to memory; a multiplication and an addition fused;
approximate roots and divisions; a thread that takes so many registers that fewer programs fit a GPU; a
variant that grew with another version; a kernel specialised on a number that changes between calls.
"""

import fcntl
import functools
import os
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from grass_kernels import _triton, adamw_kernel, arguments, is_supported, prologue, sq_norm
from tests.support import aot
from tests.support.oracle import BF16

pytest.importorskip("triton", reason="no Triton on this platform")
if _triton.INTERPRETING:
    pytest.skip("compiles for GPUs: run without TRITON_INTERPRET", allow_module_level=True)

pytestmark = pytest.mark.slow

# Five programs of 256 threads share an AMD multiprocessor's registers up to here.
MAX_REGISTERS_AMD = 96
FLAGS = list(product((False, True), repeat=2))  # running maxima, norms
VERSIONS = [v for v in dict.fromkeys([*aot.SUPPORTED, aot.INSTALLED]) if aot.has(v)]
REQUIRED = any(os.environ.get(name) for name in ("CI", "GRASS_REQUIRE_TRITONS"))


@functools.cache
def facts_of(version: str, kept: Path) -> dict[str, Any]:
    """Processes that test at the same time wait for one to compile."""
    with (kept / f"{version}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return aot.compiled_by(version, kept)


@pytest.fixture(params=VERSIONS)
def facts(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Compilations of every variant by one version."""
    return facts_of(request.param, Path(request.config.cache.mkdir("ahead-of-time")))


def of_each_binary(facts: dict[str, Any]) -> list[tuple[str, aot.Variant, str, dict[str, Any]]]:
    """Name in messages, variant, target and facts; variants that did not compile fail their own test."""
    return [
        (f"{name} on {target}", aot.variants()[name], target, found)
        for name, of_target in facts["variants"].items()
        for target, found in of_target.items()
        if "error" not in found
    ]


@pytest.mark.parametrize("version", aot.SUPPORTED)
def test_every_supported_version_is_here(version):
    if not aot.has(version):
        message = f"triton {version} is not in {aot.folder_of(version)}, so nothing is compiled with it: `make unit`"
        pytest.fail(message) if REQUIRED else pytest.skip(message)


def test_every_mixture_is_compiled():
    supported = {dtypes for dtypes in product(arguments.DTYPES, repeat=3) if is_supported(*dtypes)}
    assert {dtypes for dtypes, _ in aot.MIXTURES} == supported
    assert {r for dtypes, r in aot.MIXTURES if dtypes[0] == BF16} == set(aot.ROUNDINGS)


def places_in(variants: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    return [(variant, target) for variant, of_target in variants.items() for target in of_target]


def test_everything_compiles(facts):
    assert places_in(facts["variants"]) == aot.places(facts["triton"])
    assert not aot.errors_of(facts)


def test_what_is_compiled():
    """By development's version every variant for one target; by all, for all, whatever differs in structure."""
    every = {variant for variant, target in aot.places(aot.DEVELOPMENT) if target == aot.EVERY_VARIANT_FOR}
    assert every == aot.variants().keys()
    rows = [
        (*dtypes, rounding, amsgrad, norms) for dtypes, rounding in aot.MIXTURES for amsgrad, norms in FLAGS
    ]
    taken = [row for row in rows if aot._adamw(row[:3], *row[3:]).name in aot.structural_variants()]
    assert len(taken) <= len(rows) / 4
    for a, b in combinations(range(6), 2):
        assert {(row[a], row[b]) for row in taken} == {(row[a], row[b]) for row in rows}
    assert {v.kernel for v in map(aot.variants().get, aot.structural_variants())} == {
        v.kernel for v in aot.variants().values()
    }
    for version in aot.SUPPORTED:
        assert set(product(aot.structural_variants(), aot.TARGETS)) <= set(aot.places(version))


def test_registers_stay_registers(facts):
    kinds = ("stack", "local", "spills")
    in_memory = {
        label: {kind: found[kind] for kind in kinds}
        for label, _, _, found in of_each_binary(facts)
        if any(found[kind] for kind in kinds)
    }
    assert not in_memory


def test_full_blocks_are_accessed_by_16_bytes_of_the_widest_dtype(facts):
    """And 16-bit arrays by 8 bytes beside 32-bit ones; on AMD these cannot be told from single addresses."""
    narrow = {}
    for label, variant, target, found in of_each_binary(facts):
        for bits in (128, 64) if target in aot.NVIDIA else (128,):
            for kind, arrays in (("loads", variant.reads), ("stores", variant.writes)):
                needed = aot.vector_accesses(variant, arrays, bits // 8)
                if found[f"{kind}_{bits}"] < needed:
                    narrow[label] = f"{found[f'{kind}_{bits}']} {kind} of {bits} bits, {needed} needed"
    assert not narrow


def test_values_of_an_element_stay_in_one_thread(facts):
    """Shared memory is for the sum of squares alone, after all blocks; stochastic rounding spreads its random bits."""
    too_much = {}
    for label, variant, target, found in of_each_binary(facts):
        if variant.kernel is adamw_kernel._masked_adamw_kernel and target in aot.NVIDIA:
            limit = 8 * _triton.THREADS if "stochastic" in variant.name else 64 * ("norms" in variant.name)
            if found["shared"] > limit:
                too_much[label] = f"{found['shared']} bytes of shared memory, {limit} allowed"
    assert not too_much


def test_bfloat16_is_rounded_by_the_device(facts):
    """One instruction for two elements. The interpreter and the reference round by integers."""
    for label, variant, target, found in of_each_binary(facts):
        if variant.kernel is adamw_kernel._masked_adamw_kernel and target in aot.NVIDIA:
            param = BF16 in variant.writes[:1] and "nearest" in variant.name
            assert bool(found["bf16_conversions"]) == (param or BF16 in variant.writes[1:]), label


def test_arithmetic_rounds_as_written(facts):
    inexact = {
        label: found["inexact"]
        for label, variant, _, found in of_each_binary(facts)
        if variant.fp32_only and found["inexact"]
    }
    assert not inexact


def test_divisions_and_roots_are_rounded_to_nearest(facts):
    for label, variant, target, found in of_each_binary(facts):
        if target in aot.NVIDIA:
            assert bool(found["div_rn"]) == variant.divides, label
            assert bool(found["sqrt_rn"]) == variant.takes_roots, label


def test_as_many_programs_fit_as_planned(facts):
    too_many = {}
    for label, variant, target, found in of_each_binary(facts):
        planned = variant.max_registers or adamw_kernel.MAX_REGISTERS
        if found["registers"] > (planned if target in aot.NVIDIA else MAX_REGISTERS_AMD):
            too_many[label] = found["registers"]
    assert not too_many


def test_few_kernels_take_more_registers():
    more = [v for v in aot.variants().values() if (v.max_registers or 0) > adamw_kernel.MAX_REGISTERS]
    assert all("amsgrad norms" in variant.name for variant in more)
    assert len(more) < len(aot.variants()) / 8


def test_registers_are_those_of_the_table(facts):
    table = aot.read_registers().get(facts["triton"])
    if table is None:
        pytest.skip(
            f"no registers are recorded of triton {facts['triton']}, which is not one of {aot.SUPPORTED}"
        )
    now = aot.registers_of(facts)
    changed = {
        name: f"{table.get(name)} -> {now.get(name)}"
        for name in {**table, **now}
        if table.get(name) != now.get(name)
    }
    assert not changed, (
        f"registers changed under triton {facts['triton']}. If they were meant to: `{aot.WRITE_REGISTERS}`, "
        f"and look at the diff of {aot.REGISTERS.name}"
    )


def test_the_table_has_every_supported_version_and_variant():
    table = aot.read_registers()
    assert sorted(table) == sorted(aot.SUPPORTED)
    for version, of_variant in table.items():
        assert places_in(of_variant) == aot.places(version), f"{version}: {aot.WRITE_REGISTERS}"


def test_development_uses_a_supported_version():
    pinned = [
        line
        for line in (aot.ROOT / "constraints.txt").read_text().splitlines()
        if line.startswith("triton==")
    ]
    assert [line.removeprefix("triton==").split(";")[0].strip() for line in pinned] == [aot.DEVELOPMENT]


@pytest.mark.parametrize(
    ("kernel", "changing"),
    [
        (prologue._prologue_kernel, "headers_start num_layers"),
        (adamw_kernel._masked_adamw_kernel, " ".join(("chunks_start", *adamw_kernel.SHIFTS))),
        (sq_norm._layer_sq_norms_kernel, "chunks_start"),
        (sq_norm._sum_layers_kernel, "layers_start"),
    ],
)
def test_changing_numbers_are_not_specialised(kernel, changing):
    """A kernel specialised on them would be compiled again in the middle of training."""
    numbers = [p for p in kernel.params if not p.is_constexpr and not p.name.endswith("_ptr")]
    assert [p.name for p in numbers] == changing.split()
    assert all(p.do_not_specialize for p in numbers)
