"""Candidates: changes of the kernels that only a GPU can decide.

Each is a short list of edits to the source of `grass_kernels`. Its variant runs a copy of the package with these edits,
under a name of its own, in the same process as the original. docs/kernel-log.md has the predictions and the outcomes.
"""

import atexit
import functools
import importlib.util
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

import grass_kernels
from bench.kernels.cases import BF16, F32
from bench.kernels.problem import Problem
from bench.kernels.variants import HYPERPARAMETERS, Built, Variant, build_grass_kernels
from grass_kernels.table import BLOCK, CHUNK

PACKAGE = Path(grass_kernels.__file__).parent
COMPARED_CHUNKS = {"cuda": 2000, "cpu": 3}
COMPARED_STEPS = 5
"""Size of the comparison with the kernels before a measurement: chunks of each of two mixtures, and steps."""


class StaleEditError(Exception):
    """Raised for an edit whose text is not in the source exactly once."""


class DifferentResultError(Exception):
    """Raised for a candidate that computes something else than the kernels."""


class Edit(NamedTuple):
    """A replacement in one file of the package.

    Args:
        file: name of the file.
        old: text that occurs in it exactly once.
        new: text that takes its place.
    """

    file: str
    old: str
    new: str


class Candidate(NamedTuple):
    """A change of the kernels that is being tried.

    Args:
        name: name in rows; an identifier.
        edits: edits to the source, in order.
        expected: prediction, as in the log.
    """

    name: str
    edits: Sequence[Edit]
    expected: str


def edited_sources(candidate: Candidate) -> dict[str, str]:
    """Return the sources of the package with the edits of a candidate, by name of the file.

    Raises:
        StaleEditError: The text of an edit is missing, or occurs more than once.
    """
    sources = {path.name: path.read_text() for path in PACKAGE.glob("*.py")}
    for file, old, new in candidate.edits:
        count = sources[file].count(old) if file in sources else 0
        if count != 1:
            raise StaleEditError(
                f"{candidate.name}: {file} must have this text once, not {count} times; bring the edit up to date:\n"
                f"{old}"
            )
        sources[file] = sources[file].replace(old, new)
    return sources


@functools.cache
def _folder() -> Path:
    """Return a folder for sources, which Triton reads again at each compilation; removed when the process exits."""
    folder = tempfile.TemporaryDirectory(prefix="grass-candidates-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def load(candidate: Candidate) -> ModuleType:
    """Import a copy of `grass_kernels` with the edits of a candidate, as ``grass_kernels_<name>``; once in a process.

    Every mention of the package in its sources is renamed: absolute imports and torch operators are the copy's own.

    Raises:
        StaleEditError: See `edited_sources`.
    """
    name = f"{grass_kernels.__name__}_{candidate.name}"
    if name in sys.modules:
        return sys.modules[name]
    sources = edited_sources(candidate)
    folder = _folder() / name
    folder.mkdir(exist_ok=True)
    for file, text in sources.items():
        (folder / file).write_text(re.sub(rf"\b{grass_kernels.__name__}\b", name, text))
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        for imported in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
            del sys.modules[imported]
        raise
    return module


def _results(kernels: ModuleType, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Return tensors after steps that follow one another without a wait, and the norms of each step.

    Tensors of all lengths in two launches a step, with more programs than a GPU runs at a time.
    """
    chunks = COMPARED_CHUNKS[device.type]
    sizes = [CHUNK * chunks // 2 + 77, 7, CHUNK * chunks // 3, BLOCK, 3 * BLOCK + 1]
    layers = [0, 1, 3, 0, 3]  # 2 has no parameter
    generator = torch.Generator(device).manual_seed(0)
    columns: list[list[Tensor]] = [[], [], [], []]
    for dtypes in ((BF16, BF16, F32, F32), (BF16, BF16, BF16, BF16)):
        for column, dtype in zip(columns, dtypes, strict=True):
            column += [torch.rand(size, generator=generator, device=device).to(dtype) for size in sizes]
    steps = [torch.zeros((), device=device) for _ in columns[0]]
    norms = [torch.full((4,), float("nan"), device=device) for _ in range(COMPARED_STEPS)]
    for sq_norms in norms:
        kernels.masked_adamw_(*columns, steps, layer_index=2 * layers, sq_norms=sq_norms, **HYPERPARAMETERS)
    return [t for column in (*columns, steps) for t in column], norms


@functools.cache
def _check_results(kernels: ModuleType, device: torch.device) -> None:
    """Raise DifferentResultError if a copy does not compute what `grass_kernels` does, in norms up to their order."""
    (tensors, norms), (expected, expected_norms) = (_results(k, device) for k in (kernels, grass_kernels))
    if not all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True)):
        raise DifferentResultError(
            f"{kernels.__name__}: parameters or moments differ from those of the kernels"
        )
    if not all(torch.allclose(a, b, rtol=1e-5, atol=0) for a, b in zip(norms, expected_norms, strict=True)):
        raise DifferentResultError(f"{kernels.__name__}: norms differ from those of the kernels")


def variant_of(candidate: Candidate) -> Variant:
    """Return the variant that runs a candidate. An error in it is an outcome, not a failure of the run.

    Before it is measured its results are compared with those of the kernels: the runner's own comparison leaves out
    norms, and what a step reads that was not complete may be right in the next attempt.
    """

    def build(problem: Problem) -> Built:
        kernels = load(candidate)
        _check_results(kernels, problem.device)
        return build_grass_kernels(problem, kernels)

    return Variant(candidate.name, build)


# -- the candidates ---------------------------------------------------------------------------------------

EVICT_FIRST = Candidate(
    "evict_first",
    # Functions of the same names hide the imported ones in this file alone: where gradients are read twice, to clip
    # by their norm, the first reading shall leave them in the cache.
    [
        Edit(
            "adamw_kernel.py",
            "# Rounding of a parameter.\n",
            """@jit()
def load(pointers, mask):
    return tl.load(pointers, eviction_policy="evict_first") if mask is None else tl.load(pointers, mask=mask, other=0)


@jit()
def load_fp32(pointers, mask):
    return to_fp32(load(pointers, mask))


@jit()
def store(pointers, x, mask):
    if mask is None:
        tl.store(pointers, x, eviction_policy="evict_first")
    else:
        tl.store(pointers, x, mask=mask)


@jit()
def store_fp32(pointers, x, mask):
    store(pointers, from_fp32(x, pointers.dtype.element_ty), mask)


# Rounding of a parameter.
""",
        ),
        Edit(
            "adamw_kernel.py",
            "    block_pointers,\n    join_fp32,",
            "    block_pointers,\n    from_fp32,\n    join_fp32,",
        ),
        Edit("adamw_kernel.py", "tl.store(param_block, upper, mask=mask)", "store(param_block, upper, mask)"),
        Edit(
            "adamw_kernel.py",
            "tl.store(remainder_block, remainder, mask=mask)",
            "store(remainder_block, remainder, mask)",
        ),
        Edit(
            "adamw_kernel.py",
            "tl.store(param_block, round_stochastically(param, random), mask=mask)",
            "store(param_block, round_stochastically(param, random), mask)",
        ),
    ],
    "0 to 2 % less time",
)

CHUNK_32768 = Candidate(
    "chunk_32768",
    [Edit("table.py", "CHUNK = 16384\n", "CHUNK = 32768\n")],
    "at most 1 % either way with all layers active; slower with few of them",
)

_WAIT = """    if ON_DEVICE:
        tl.extra.cuda.gdc_wait()
"""
_TRIGGER = """    if ON_DEVICE:
        tl.extra.cuda.gdc_launch_dependents()
"""

DEPENDENT_LAUNCH = Candidate(
    "dependent_launch",
    # The order of memory operations. The prologue is launched normally: it begins when all that was queued before it,
    # uploads of the table and of the inputs included, is complete. Whatever is launched dependently begins after it
    # has begun, so the table and the inputs may be read at once. What the prologue and main passes write
    # (coefficients, partial sums) is read after gdc_wait, which returns when the grid before is complete and its
    # writes are visible. Every program of a dependent grid waits before it ends, so that grid is complete only
    # after the one before it: waiting for the last one is waiting for all, also with several main passes in a row,
    # which write to different elements. The next kernel that is launched normally waits for the last of these grids.
    # The trigger comes first in each program: it fires when the last program of the grid has begun, so a waiting
    # program never takes the place of one that it waits for. sm_90 and later.
    [
        Edit(
            "_triton.py",
            "    max_registers: int | None = None,\n    **arguments: Any,",
            "    max_registers: int | None = None,\n    dependent: bool = False,\n    **arguments: Any,",
        ),
        Edit(
            "_triton.py",
            "_warp_size(device), threads, max_registers\n    )\n",
            '_warp_size(device), threads, max_registers\n    )\n    options["launch_pdl"] = dependent\n',
        ),
        Edit(
            "prologue.py",
            "from grass_kernels.inputs import",
            "from grass_kernels.conversions import ON_DEVICE\nfrom grass_kernels.inputs import",
        ),
        Edit("prologue.py", "    tensor = tl.program_id(0)", f"{_TRIGGER}    tensor = tl.program_id(0)"),
        Edit("adamw_kernel.py", "import (\n    block_mask,", "import (\n    ON_DEVICE,\n    block_mask,"),
        Edit(
            "adamw_kernel.py",
            "    tensor, chunk, row = find_chunk(",
            f"{_TRIGGER}    tensor, chunk, row = find_chunk(",
        ),
        Edit("adamw_kernel.py", "    c_ptr = coefficients_ptr", f"{_WAIT}    c_ptr = coefficients_ptr"),
        Edit(
            "plan.py",
            "max_registers=max_registers(key",
            "dependent=True,\n                max_registers=max_registers(key",
        ),
        Edit("sq_norm.py", "    ALIGNMENT,\n", "    ALIGNMENT,\n    ON_DEVICE,\n"),
        Edit(
            "sq_norm.py",
            "    sums = tl.zeros((BLOCK,), dtype=tl.float32)\n    for start in range(begin, end, BLOCK):",
            f"{_WAIT}    sums = tl.zeros((BLOCK,), dtype=tl.float32)\n    for start in range(begin, end, BLOCK):",
        ),
        Edit(
            "sq_norm.py",
            "        table.num_layers,\n        table.data.device,\n",
            "        table.num_layers,\n        table.data.device,\n        dependent=True,\n",
        ),
    ],
    "2 to 6 us a step less, visible with few active layers only",
)

NORMS_IN_LAST_PROGRAM = Candidate(
    "norms_in_last_program",
    # A counter a layer, to which each program of the layer adds 1 after it has stored its partial sum: the one that
    # adds the last 1 sums the layer, in the order of `_sum_layers_kernel`. The release of its atomic addition makes
    # the partial sum of a program visible before its 1 is; the acquire of the last one, and the barrier by
    # which its result reaches the other threads, order their loads after all partial sums. These bypass the L1 cache,
    # which may hold a line from before. All launches of a step add to the same counters; a program whose
    # parameters are not updated stores 0, and counts. The prologue sets counters and norms to 0, also those of layers
    # without elements.
    [
        Edit("adamw.py", "norms=sq_norms is not None", "norms=sq_norms"),
        Edit("plan.py", "norms: bool = False", "norms: Tensor | None = None"),
        Edit(
            "plan.py",
            "        self._norms = norms\n",
            "        self._norms, self._grad_scale = norms, grad_scale\n",
        ),
        Edit(
            "plan.py",
            "            sq_norms_ptr=clip_by,\n",
            """            sq_norms_ptr=clip_by,
            counters_ptr=None if norms is None else self._counters,
            norms_ptr=norms,
            norms_count=self.table.num_layers,
""",
        ),
        Edit(
            "plan.py",
            "        self._buffers = [",
            """        self._counters = torch.empty(num_layers, dtype=torch.int32, device=device)
        self._buffers = [self._counters, """,
        ),
        Edit("plan.py", "key.amsgrad, self._norms)", "key.amsgrad, self._norms is not None)"),
        Edit(
            "plan.py",
            "                partials_ptr=self._partials if self._norms else None,\n",
            "                partials_ptr=None if self._norms is None else self._partials,\n"
            "                counters_ptr=None if self._norms is None else self._counters,\n"
            "                sq_norms_ptr=self._norms,\n"
            "                grad_scale_ptr=None if self._norms is None else self._grad_scale,\n"
            "                layers_start=self.table.layers_start,\n"
            "                LAYER_BLOCK=LAYER_BLOCK,\n",
        ),
        Edit(
            "plan.py",
            "        if sq_norms is not None:\n",
            "        if sq_norms is not None and self.table.num_tensors == 0:  # nothing was launched\n",
        ),
        Edit(
            "plan.py",
            "import BLOCK, CHUNK, COEFFICIENTS, ChunkRun",
            "import BLOCK, CHUNK, COEFFICIENTS, LAYER_BLOCK, ChunkRun",
        ),
        Edit(
            "prologue.py",
            "    headers_start,  # first word",
            """    counters_ptr,  # output: int32 [norms_count], or None
    norms_ptr,  # output: float32 [norms_count], or None
    norms_count,
    headers_start,  # first word""",
        ),
        Edit(
            "prologue.py", '"headers_start", "num_layers")', '"headers_start", "num_layers", "norms_count")'
        ),
        Edit(
            "prologue.py",
            "    row = table_ptr + tensor * ROW\n",
            """    if counters_ptr is not None and tensor == 0:
        for start in range(0, norms_count, NORM_BLOCK):
            index = start + tl.arange(0, NORM_BLOCK)
            tl.store(counters_ptr + index, 0, mask=index < norms_count)
            tl.store(norms_ptr + index, 0.0, mask=index < norms_count)
    row = table_ptr + tensor * ROW
""",
        ),
        Edit("adamw_kernel.py", '("chunks_start", *SHIFTS)', '("chunks_start", "layers_start", *SHIFTS)'),
        Edit(
            "adamw_kernel.py",
            "    chunks_start,  # first word",
            "    counters_ptr,  # int32 [num_layers]: programs that have stored their partial sums; or None\n"
            "    sq_norms_ptr,  # output: float32 [num_layers], or None\n"
            "    grad_scale_ptr,  # float32 [1] or None\n"
            "    layers_start,  # first word of the layers in the table\n"
            "    chunks_start,  # first word",
        ),
        Edit(
            "adamw_kernel.py",
            "    CHUNK: tl.constexpr,\n    BLOCK: tl.constexpr,\n    NARROW",
            "    CHUNK: tl.constexpr,\n    LAYER_BLOCK: tl.constexpr,\n    BLOCK: tl.constexpr,\n    NARROW",
        ),
        Edit("adamw_kernel.py", "    FIRST_PARTIAL,\n", "    FIRST_PARTIAL,\n    LAYER,\n"),
        Edit(
            "adamw_kernel.py",
            "        tl.store(partials_ptr + partial, tree_sum(sums, BLOCK))\n",
            """        tl.store(partials_ptr + partial, tree_sum(sums, BLOCK))
        layer = tl.load(row + LAYER)
        begin = tl.load(table_ptr + layers_start + layer)
        end = tl.load(table_ptr + layers_start + layer + 1)
        if tl.atomic_add(counters_ptr + layer, 1, sem="acq_rel", scope="gpu") == end - begin - 1:
            total = tl.zeros((LAYER_BLOCK,), dtype=tl.float32)
            for first in range(begin, end, LAYER_BLOCK):
                index = first + tl.arange(0, LAYER_BLOCK)
                total += tl.load(partials_ptr + index, mask=index < end, other=0.0, cache_modifier=".cg")
            sq_norm = tree_sum(total, LAYER_BLOCK)
            if grad_scale_ptr is not None:
                inverse = tl.div_rn(1.0, tl.load(grad_scale_ptr))
                sq_norm = sq_norm * inverse * inverse
            tl.store(sq_norms_ptr + layer, sq_norm)
""",
        ),
    ],
    "3 to 5 us a step less, by the launch; each program waits for a fence at its end, which may take as much",
)

ZEROS_APART = Candidate(
    "zeros_apart",
    # 0 / x is 0 with the sign of the numerator for every x > 0, infinity too, and so is the root of 0: the result is
    # the numerator itself. Where it is not (x is 0, negative or NaN) the division itself runs.
    [
        Edit(
            "adamw_kernel.py",
            """    denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), bias_correction2_sqrt) + eps
    param = param - tl.div_rn(step_size * exp_avg, denominator)
""",
            """    known = exp_avg_sq == tl.where(bias_correction2_sqrt > 0, 0.0, float("nan"))
    root = tl.div_rn(tl.sqrt_rn(tl.where(known, 1.0, exp_avg_sq)), bias_correction2_sqrt)
    denominator = tl.where(known, exp_avg_sq, root) + eps
    numerator = step_size * exp_avg
    known = (numerator == 0) & (denominator > 0)
    quotient = tl.div_rn(tl.where(known, denominator, numerator), denominator)
    param = param - tl.where(known, numerator, quotient)
""",
        )
    ],
    "no change of mixed dtypes, at most 3 % more of all bf16; with zeros as fast as without",
)

CANDIDATES = (EVICT_FIRST, CHUNK_32768, DEPENDENT_LAUNCH, NORMS_IN_LAST_PROGRAM, ZEROS_APART)
