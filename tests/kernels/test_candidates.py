"""Candidates (`bench/gpu/candidates.py`): edits of the kernels that a GPU is to decide about.

Failures these tests catch: an edit that the source has outgrown, so that the original would be measured under another
name; a copy that runs parts of the original; results that differ from those of the kernels; an option that does not
reach the machine code, or makes it spill; a wait that comes after what it should protect.
"""

import functools
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import grass_kernels
from bench.gpu import candidates
from bench.gpu.candidates import (
    CANDIDATES,
    CHUNK_32768,
    DEPENDENT_LAUNCH,
    EVICT_FIRST,
    NORMS_IN_LAST_PROGRAM,
    ZEROS_APART,
    Candidate,
    DifferentResultError,
    Edit,
    StaleEditError,
    edited_sources,
    load,
    variant_of,
)
from bench.kernels import problem
from bench.kernels.cases import Case
from grass_kernels.table import BLOCK, CHUNK, LAYER_BLOCK
from tests.support import aot
from tests.support.buffers import Buffers, interpreter_only, same_bits
from tests.support.kernel_problem import HYPER, Problem
from tests.support.oracle import BF16, F32

each_candidate = pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda candidate: candidate.name)
plain_only = pytest.mark.plain_only(reason="compiles for GPUs, or tests what is no kernel")
needs_triton = pytest.mark.skipif(aot.INSTALLED is None, reason="no Triton on this platform")


# -- edits and copies ----------------------------------------------------------------------------------


@each_candidate
def test_every_edit_applies(candidate):
    """Catches a change of the source after which an edit has no place, or more than one."""
    original = {path.name: path.read_text() for path in Path(grass_kernels.__file__).parent.glob("*.py")}
    sources = edited_sources(candidate)
    assert sources.keys() == original.keys()
    changed = {file for file, text in sources.items() if text != original[file]}
    assert changed == {edit.file for edit in candidate.edits}


@pytest.mark.parametrize(
    ("file", "old"), [("table.py", "CHUNK = 16385"), ("table.py", "CHUNK"), ("no_file.py", "CHUNK = 16384")]
)
def test_an_edit_without_its_one_place_is_refused(file, old):
    """Catches a stale edit that is skipped, or applied to a place that was not meant."""
    with pytest.raises(StaleEditError, match=rf"stale: {file} must have this text once"):
        load(Candidate("stale", [Edit(file, old, "")], ""))


@each_candidate
def test_a_copy_is_a_package_of_its_own(candidate):
    """Catches modules, kernels and operators of the original in a copy, and one that is imported twice."""
    module = load(candidate)
    assert load(candidate) is module
    name = f"grass_kernels_{candidate.name}"
    sources = list(Path(module.__file__).parent.glob("*.py"))
    assert len(sources) == len(edited_sources(candidate))
    assert not any(re.search(r"\bgrass_kernels\b", source.read_text()) for source in sources)
    assert module.plan._masked_adamw_kernel is module.adamw_kernel._masked_adamw_kernel
    assert module.plan._masked_adamw_kernel is not grass_kernels.plan._masked_adamw_kernel
    assert module.masked_adamw_.__module__ == f"{name}.adamw"
    assert getattr(torch.ops, name).masked_adamw_ is not torch.ops.grass_kernels.masked_adamw_


@plain_only
def test_sources_are_there_as_long_as_the_process():
    """Catches sources that are gone when Triton reads them, or left behind for ever."""
    script = (
        "import gc; from pathlib import Path; from bench.gpu.candidates import CHUNK_32768, load;"
        "file = Path(load(CHUNK_32768).__file__); gc.collect(); assert file.exists(); print(file.parent)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=aot.ROOT, capture_output=True, text=True, check=True
    )
    folder = Path(run.stdout.strip())
    assert folder.name == "grass_kernels_chunk_32768"
    assert not folder.parent.exists()


def test_a_variant_runs_its_copy(monkeypatch):
    """Catches the original measured under the name of a candidate."""
    called = []

    def spy(function, *arguments, **options):
        called.append(function.__module__)
        return function(*arguments, **options)

    for module in (grass_kernels, load(CHUNK_32768)):
        for name in ("masked_adamw_", "layer_sq_norms"):
            monkeypatch.setattr(module, name, functools.partial(spy, getattr(module, name)))
    monkeypatch.setattr(candidates, "_check_results", lambda kernels, device: None)
    variant = variant_of(CHUNK_32768)
    variant.build(problem.Problem(Case(300, 3, clip=True), torch.device("cpu"))).step()
    assert variant.name == "chunk_32768"
    assert called == ["grass_kernels_chunk_32768.sq_norm", "grass_kernels_chunk_32768.adamw"]


# -- results -------------------------------------------------------------------------------------------

LAYERS = [0, 3, 1, 0, 3, 4]
SIZES = [BLOCK + 5, 7, CHUNK + 77, 1, BLOCK, 0]
ACTIVE = [True, True, True, False, True]


def update(buffers: Buffers, module: ModuleType, **options) -> list[Tensor]:
    """Parameters, moments, counters, and norms of a step of two launches; layer 2 has no parameter, 4 no element."""
    of_each = [Problem(buffers, (BF16, BF16, state), sizes=SIZES) for state in (F32, BF16)]
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps")
    columns = [[t for problem in of_each for t in getattr(problem, name)] for name in names]
    sq_norms = torch.full((len(ACTIVE),), float("nan"))
    module.masked_adamw_(*columns, layer_index=2 * LAYERS, sq_norms=sq_norms, **HYPER, **options)
    return [*(t for column in columns for t in column), sq_norms]


@interpreter_only
@each_candidate
@pytest.mark.parametrize("options", ["plain", "mask and scale", "master", "stochastic"])
def test_a_candidate_computes_the_same(buffers, candidate, options):
    """Catches another result: of parameters, moments, counters, or of norms, be a layer masked, empty or in parts."""
    masked = options == "mask and scale"

    def run(module: ModuleType) -> list[Tensor]:
        given = {"active": torch.tensor(ACTIVE), "grad_scale": torch.tensor(3.0)} if masked else {}
        if options == "master":
            given["remainders"] = [torch.zeros(size, dtype=torch.int16) for size in 2 * SIZES]
        elif options == "stochastic":
            given["rounding_seeds"] = list(range(2 * len(SIZES)))
        return [*given.get("remainders", []), *update(buffers, module, **given)]

    expected, found = run(grass_kernels), run(load(candidate))
    assert not expected[-1].isnan().any()
    assert expected[-1].count_nonzero() == (2 if masked else 3)
    if candidate is CHUNK_32768:  # its partial sums are other ones
        torch.testing.assert_close(found.pop(), expected.pop(), rtol=1e-6, atol=0)
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a, b)


@interpreter_only
@each_candidate
@pytest.mark.parametrize("active", [[False] * 5, None], ids=["none active", "no parameters"])
def test_norms_are_0_where_nothing_is_launched(candidate, active):
    """Catches norms that are left as they were, since no program writes them."""
    count = 0 if active is None else 1
    columns = [[torch.ones(3)] * count for _ in range(4)]
    sq_norms = torch.full((5,), float("nan"))
    options = {"layer_index": [2] * count, "active": active, "sq_norms": sq_norms, **HYPER}
    load(candidate).masked_adamw_(*columns, [torch.tensor(0.0)] * count, **options)
    assert sq_norms.tolist() == [0.0] * 5


@interpreter_only
def test_all_but_the_prologue_is_launched_dependently(buffers, monkeypatch):
    """Catches a prologue that begins before uploads are complete, and a launch that gains nothing."""
    module, launched = load(DEPENDENT_LAUNCH), []
    launch = module._triton.launch

    def spy(kernel, *arguments, **options):
        launched.append((kernel.__name__, options.get("dependent", False)))
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(module._triton, "launch", spy)
    update(buffers, module)
    main = ("_masked_adamw_kernel", True)
    assert launched == [("_prologue_kernel", False), main, main, ("_sum_layers_kernel", True)]


@interpreter_only
def test_norms_of_more_partial_sums_than_a_block(buffers, monkeypatch):
    """Catches another order of additions, or a partial sum left out, where the last program takes several rounds."""
    module = load(NORMS_IN_LAST_PROGRAM)
    monkeypatch.setattr(grass_kernels.sq_norm, "LAYER_BLOCK", 2)
    monkeypatch.setattr(module.plan, "LAYER_BLOCK", 2)
    expected, found = (update(buffers, kernels)[-1] for kernels in (grass_kernels, module))
    assert same_bits(found, expected)


@interpreter_only
@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (
            Edit("adamw_kernel.py", "bias_correction2_sqrt) + eps", "bias_correction2_sqrt) + 1e-3"),
            "parameters",
        ),
        (
            Edit(
                "sq_norm.py", "tl.store(sq_norms_ptr + layer, sq_norm)", "tl.store(sq_norms_ptr + layer, 0.0)"
            ),
            "norms",
        ),
    ],
    ids=["parameters", "norms"],
)
def test_a_candidate_with_other_results_is_not_measured(edit, what, monkeypatch):
    """Catches a time of something that computes nothing useful."""
    monkeypatch.setattr(candidates, "COMPARED_STEPS", 1)
    variant = variant_of(Candidate(f"wrong_{what}", [edit], ""))
    with pytest.raises(DifferentResultError, match=f"grass_kernels_wrong_{what}: {what}"):
        variant.build(problem.Problem(Case(300, 3), torch.device("cpu")))


EDGES = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e-45,
    -1e-45,
    1e-38,
    1e-20,
    -1e-20,
    3e38,
    -3e38,
    *map(float, ("inf", "-inf", "nan")),
]


@interpreter_only
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize(("step", "lr"), [(9.0, 1e-3), (9.0, -1e-3), (-3.0, 1e-3), (9.0, float("inf"))])
def test_zeros_apart_are_bitwise_the_same(buffers, step, lr, eps, amsgrad):
    """Catches another quotient or root than that of the division and the root: of -0, infinity, NaN, and by 0."""
    rows = 3 * list(product(EDGES, EDGES, (0.0, -0.0, 1e-30, 1.0)))  # first moment, second moment, gradient
    assert 0 < len(rows) % BLOCK < len(rows)  # a full block, and a part of one

    def run(module: ModuleType) -> list[Tensor]:
        exp_avg, exp_avg_sq, grad = torch.tensor(rows).unbind(1)
        param = torch.tensor([1.0, 0.0, -0.0]).repeat_interleave(len(rows) // 3)
        columns = [[buffers.place(t, F32)] for t in (param, grad, exp_avg, exp_avg_sq)]
        maxima = [buffers.place(exp_avg_sq.flip(0), F32)] if amsgrad else None
        options = {**HYPER, "lr": lr, "eps": eps, "max_exp_avg_sqs": maxima}
        module.masked_adamw_(*columns, [torch.tensor(step)], **options)
        return [t for column in columns for t in column]

    expected, found = run(grass_kernels), run(load(ZEROS_APART))
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a, b)


# -- machine code --------------------------------------------------------------------------------------

NORMS_ARGUMENTS = {
    "counters_ptr": "*i32",
    "sq_norms_ptr": "*fp32",
    "grad_scale_ptr": "*fp32",
    "layers_start": "i32",
    "LAYER_BLOCK": LAYER_BLOCK,
    "norms_ptr": "*fp32",
    "norms_count": "i32",
}
"""Arguments that kernels have in `NORMS_IN_LAST_PROGRAM` alone."""
MIXED = "adamw bf16-bf16-fp32 nearest norms"


def compiled(candidate: Candidate, name: str, monkeypatch: pytest.MonkeyPatch, folder: Path):
    """The binary of a candidate's kernel for sm_90, by the installed Triton; `name` is that of a variant of `aot`."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    module, variant = load(candidate), aot.variants()[name]
    kernel = getattr(module.plan, variant.kernel.__name__, None) or module.sq_norm._sum_layers_kernel
    known = {**NORMS_ARGUMENTS, **variant.arguments, "CHUNK": module.table.CHUNK}
    arguments = {argument: known[argument] for argument in kernel.arg_names}
    return aot._compile(variant._replace(kernel=kernel, arguments=arguments), "sm_90")


@plain_only
@needs_triton
@pytest.mark.slow
@each_candidate
@pytest.mark.parametrize(
    ("name", "loads", "stores"),
    [
        (MIXED, 4, 4),
        ("adamw bf16-bf16-bf16 nearest norms", 4, 3),
        ("prologue on_device", 0, 0),
        ("sum_layers grad_scale", None, 0),
    ],
)
def test_a_candidate_compiles_without_spilling(candidate, name, loads, stores, monkeypatch, tmp_path):
    """Catches what the interpreter runs and a compiler refuses, registers in memory, and narrower accesses."""
    facts = aot._nvidia_facts(compiled(candidate, name, monkeypatch, tmp_path))
    assert (facts["stack"], facts["local"], facts["spills"]) == (0, 0, 0)
    assert facts["registers"] <= 80
    assert facts["inexact"] == [] or not aot.variants()[name].fp32_only
    assert facts["stores_128"] == stores
    assert loads in (facts["loads_128"], None)


@plain_only
@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("candidate", "patterns"),
    [
        # Two accesses of each array, with 4 elements of a thread in each.
        (
            EVICT_FIRST,
            {r"ld\.global\S*L1::evict_first\S*\.v\d": 8, r"st\.global\S*L1::evict_first\S*\.v\d": 6},
        ),
        (DEPENDENT_LAUNCH, {r"griddepcontrol\.launch_dependents": 1, r"griddepcontrol\.wait": 1}),
        # Its partial sums in blocks of 4,096, by 256 threads.
        (NORMS_IN_LAST_PROGRAM, {r"atom\.global\.gpu\.acq_rel\.add": 1, r"ld\.global\.cg": 16}),
    ],
    ids=lambda value: value.name if isinstance(value, Candidate) else "",
)
def test_an_option_reaches_the_machine_code(candidate, patterns, monkeypatch, tmp_path):
    """Catches an option that Triton drops, or that reaches other accesses than it should."""
    ptx = compiled(candidate, MIXED, monkeypatch, tmp_path).asm["ptx"]
    assert {pattern: len(re.findall(pattern, ptx)) for pattern in patterns} == patterns


@plain_only
@needs_triton
@pytest.mark.slow
def test_a_dependent_kernel_waits_before_it_reads_what_another_writes(monkeypatch, tmp_path):
    """Catches a wait behind a read of a coefficient or a write, in the source or by the compiler.

    Before it are the word of the chunk, the gradient's address and seven columns of the table, which are not written.
    """
    binary = compiled(DEPENDENT_LAUNCH, MIXED, monkeypatch, tmp_path)
    (tmp_path / "cubin").write_bytes(binary.asm["cubin"])
    code = aot._tool("nvdisasm", "--no-dataflow", str(tmp_path / "cubin"))
    prologue = compiled(DEPENDENT_LAUNCH, "prologue on_device", monkeypatch, tmp_path).asm["ptx"]
    assert "griddepcontrol.launch_dependents" in prologue
    assert "griddepcontrol.wait" not in prologue  # it is launched normally
    total = compiled(DEPENDENT_LAUNCH, "sum_layers grad_scale", monkeypatch, tmp_path).asm["ptx"]
    assert total.index("griddepcontrol.wait") < total.index("ld.global.b32")
    before, behind = code.split("ACQBULK")  # griddepcontrol.wait
    assert "PREEXIT" in before  # griddepcontrol.launch_dependents
    assert "STG" not in before
    assert len(re.findall(r"\bLDG\b", before)) == 9
    assert len(re.findall(r"\bLDG\b", behind)) > 10  # the coefficients, and all blocks
