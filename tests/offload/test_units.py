"""Would catch: an element that no unit holds, or two; a cut inside a chunk, which would change norms and roundings with
the size of a buffer; a unit larger than its buffer, or sections that overlap or are unaligned in it; needlessly
small units; an error about small buffers whose own advice does not help.
"""

import itertools
import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from grass.errors import ConfigError
from grass.offload.store import ALIGNMENT, Slab
from grass.offload.units import Unit, cut, elements_in
from grass_kernels.table import CHUNK

pytestmark = pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")

F32, BF16, I16 = torch.float32, torch.bfloat16, torch.int16
KINDS = {
    "float32": {"exp_avg": F32, "exp_avg_sq": F32},
    "bfloat16": {"exp_avg": BF16, "exp_avg_sq": BF16},
    "exact": {"exp_avg": F32, "exp_avg_sq": F32, "remainder": I16},
    "exact bfloat16": {"exp_avg": BF16, "exp_avg_sq": BF16, "remainder": I16},
    "amsgrad": {"exp_avg": F32, "exp_avg_sq": F32, "max_exp_avg_sq": F32},
    "amsgrad bfloat16": {"exp_avg": BF16, "exp_avg_sq": BF16, "max_exp_avg_sq": BF16},
    "all": {"exp_avg": F32, "exp_avg_sq": F32, "max_exp_avg_sq": F32, "remainder": I16},
}
SIZES = st.one_of(
    st.integers(0, 300),
    st.integers(0, 6 * CHUNK),
    st.sampled_from([0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 5 * CHUNK]),
)


def least(kinds: dict[str, torch.dtype]) -> int:
    """Bytes of a buffer for one chunk."""
    return CHUNK * sum(dtype.itemsize for dtype in kinds.values()) + ALIGNMENT * len(kinds)


def slab_of(sizes: list[int], kinds: dict[str, torch.dtype]) -> tuple[list[Tensor], Slab]:
    params = [torch.empty(size, device="meta") for size in sizes]
    return params, Slab(params, kinds, pinned=False)


def check_cover(params: list[Tensor], slab: Slab, units: list[Unit]) -> None:
    """Every chunk of every parameter once, in order, each unit one run of every section."""
    expected = [(p, chunk) for p in params for chunk in range(-(-p.numel() // CHUNK))]
    found = []
    for number, unit in enumerate(units):
        assert (unit.bucket, unit.label) == (7, f"7.{number}")
        assert unit.parts
        reach = unit.start
        for part in unit.parts:
            p = part.param
            found += [(p, chunk) for chunk in range(part.first_chunk, part.first_chunk + part.num_chunks)]
            offset = part.start - slab.starts[p]
            assert offset == part.first_chunk * CHUNK, "cut inside a chunk"
            assert part.numel == min(p.numel() - offset, part.num_chunks * CHUNK)
            assert part.start >= reach
            reach = part.start + part.numel
        assert list(unit.host) == list(slab.sections)
        for kind, section in slab.sections.items():
            view = unit.host[kind]
            assert view.numel() == reach - unit.start
            assert view.data_ptr() == section.data_ptr() + unit.start * section.itemsize
        assert unit.num_bytes == sum(t.numel() * t.itemsize for t in unit.host.values())
    assert len(found) == len(expected)
    assert all(p is q and a == b for (p, a), (q, b) in zip(found, expected, strict=True))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(SIZES, max_size=7), st.sampled_from(list(KINDS)), st.one_of(st.just(0), st.integers(0, 2**20))
)
@example([], "float32", 0)
@example([0, 0], "float32", 0)
@example([CHUNK, CHUNK], "all", 0)
@example([5 * CHUNK + 1], "float32", 0)
@example([100, CHUNK], "float32", 0)
@example([5 * CHUNK + 1], "float32", 2 * least(KINDS["float32"]))  # several chunks, and more in the next unit
def test_units_cover_a_slab_within_their_buffers(sizes: list[int], name: str, more: int) -> None:
    kinds = KINDS[name]
    params, slab = slab_of(sizes, kinds)
    capacity = least(kinds) + more
    units = cut(7, slab, capacity)
    check_cover(params, slab, units)
    limit = elements_in(capacity, kinds)
    for unit in units:
        views = unit.views(torch.empty(capacity, dtype=torch.uint8))
        for kind, view in views.items():
            host = unit.host[kind]
            assert (view.dtype, view.numel()) == (host.dtype, host.numel())
            assert view.storage_offset() * view.itemsize % ALIGNMENT == 0
        for number, view in enumerate(views.values()):
            view.fill_(number + 1)
        assert all(bool((view == i + 1).all()) for i, view in enumerate(views.values())), "they overlap"
    for unit, after in itertools.pairwise(units):
        first = after.parts[0]
        with_one_more = first.start + min(first.numel, CHUNK) - unit.start
        assert with_one_more > limit, "another chunk had room in the unit before"


@settings(max_examples=40, deadline=None)
@given(st.lists(SIZES, max_size=7), st.sampled_from(list(KINDS)))
def test_without_a_limit_a_slab_is_one_unit(sizes: list[int], name: str) -> None:
    params, slab = slab_of(sizes, KINDS[name])
    units = cut(7, slab, None)
    check_cover(params, slab, units)
    assert len(units) == (sum(sizes) > 0)


def test_where_cuts_are_depends_on_each_parameter_alone() -> None:
    """A chunk begins where it would without neighbours: what it holds, hence its sum, is always the same."""
    for before in (0, 1, 127, 5000, CHUNK - 1):
        params, slab = slab_of([before, 3 * CHUNK + 10], KINDS["float32"])
        for units in (cut(0, slab, least(KINDS["float32"])), cut(0, slab, 2 * least(KINDS["float32"]))):
            parts = [part for unit in units for part in unit.parts if part.param is params[1]]
            starts = [part.start - slab.starts[params[1]] for part in parts]
            assert all(start % CHUNK == 0 for start in starts)


@pytest.mark.parametrize("name", KINDS)
def test_a_buffer_below_a_chunk_is_refused_and_the_advice_helps(name: str) -> None:
    kinds = KINDS[name]
    assert elements_in(least(kinds), kinds) == CHUNK
    _, slab = slab_of([10], kinds)
    for capacity in (0, 1, least(kinds) - 1):
        for refuse in (lambda: elements_in(capacity, kinds), lambda: cut(0, slab, capacity)):  # noqa: B023
            with pytest.raises(ConfigError, match=f"{capacity:,} bytes.*{least(kinds):,}") as raised:
                refuse()
    advised = re.search(r"buffer_mb of at least ([0-9.e+-]+)", str(raised.value))
    assert advised is not None
    assert elements_in(int(float(advised[1]) * 2**20), kinds) >= CHUNK, f"{advised[1]} is too little as well"
