"""Pointer and chunk tables.

Would catch: a misaligned tensor marked aligned (a GPU would fault, the interpreter would not notice); a
chunk missing or listed twice; a tensor's chunks moved to another launch; partial sums of one layer that
overlap another's, or change places with the company they are in; addresses or positions cut to 32 bits.
"""

import pytest
import torch

from grass_kernels.table import CHUNK, COLUMNS, HEADER, build_table

from .conftest import Buffers
from .oracle import BF16, F32

WORD = {name: position for position, name in enumerate(COLUMNS)}
CPU = torch.device("cpu")


def rows_of(table):
    start = getattr(HEADER, "value", HEADER)
    return table.data[start : start + table.num_tensors * len(COLUMNS)].view(-1, len(COLUMNS))


def grads_of(*sizes, dtype=F32):
    return [torch.zeros(n, dtype=dtype) for n in sizes]


def table_of(grads, layers=None, num_layers=None, **lists):
    layers = layers or [0] * len(grads)
    return build_table(
        grads=grads, keys=[(g.dtype,) for g in grads], layers=layers,
        num_layers=num_layers or max(layers, default=0) + 1, device=CPU, **lists,
    )  # fmt: skip


@pytest.mark.parametrize("column", ["params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"])
@pytest.mark.parametrize("shift", [0, 1, 2, 4, 7, 8])
def test_one_misaligned_address_makes_the_tensor_misaligned(buffers: Buffers, column, shift):
    lists = {
        name: [buffers.place(torch.zeros(64), F32, shift=shift if name == column else 0), torch.zeros(64)]
        for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
    }
    table = table_of(**lists)
    assert rows_of(table)[:, WORD["aligned"]].tolist() == [int(shift % 4 == 0), 1]


def test_bf16_alignment_counts_bytes(buffers: Buffers):
    grads = [buffers.place(torch.zeros(64), BF16, shift=shift) for shift in (0, 1, 4, 8)]
    assert rows_of(table_of(grads))[:, WORD["aligned"]].tolist() == [1, 0, 0, 1]


def test_a_counter_may_lie_anywhere(buffers: Buffers):
    steps = list(torch.zeros(3))
    assert rows_of(table_of(grads_of(1, 1, 1), steps=steps))[:, WORD["aligned"]].tolist() == [1, 1, 1]


def test_every_chunk_once_and_by_dtype():
    sizes = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]
    grads = grads_of(*sizes) + grads_of(*sizes, dtype=BF16)
    mixed = [g for pair in zip(grads[: len(sizes)], grads[len(sizes) :], strict=True) for g in pair]
    table = table_of(mixed)
    seen = []
    for (dtype,), start, count in table.runs:
        for word in table.data[start : start + count].tolist():
            tensor, chunk = word >> 32, word & 0xFFFFFFFF
            assert mixed[tensor].dtype == dtype
            seen.append((tensor, chunk))
    expected = [(i, c) for i, g in enumerate(mixed) for c in range(-(-g.numel() // CHUNK))]
    assert sorted(seen) == expected
    assert table.num_partials == len(expected)
    assert len(table.runs) == 2


def test_rows_hold_addresses_and_sizes():
    grads, params = grads_of(3, 5), grads_of(3, 5)
    rows = rows_of(table_of(grads, [1, 0], params=params))
    assert rows[:, WORD["grad"]].tolist() == [g.data_ptr() for g in grads]
    assert rows[:, WORD["param"]].tolist() == [p.data_ptr() for p in params]
    assert rows[:, WORD["exp_avg"]].tolist() == [0, 0]
    assert rows[:, WORD["numel"]].tolist() == [3, 5]
    assert rows[:, WORD["layer"]].tolist() == [1, 0]


def test_partial_sums_of_a_layer_are_one_run_in_list_order():
    sizes = [CHUNK + 1, 1, 2 * CHUNK, 0, 5]
    layers = [2, 0, 2, 1, 0]
    table = table_of(grads_of(*sizes), layers, 4)
    bounds = table.data[table.layers_start : table.layers_start + 5].tolist()
    assert bounds == [0, 2, 2, 6, 6]
    assert rows_of(table)[:, WORD["first_partial"]].tolist() == [2, 0, 4, 2, 1]


def test_sizes_beyond_32_bits():
    huge = torch.empty(1).expand((1 << 32) + 1)  # only its size is read
    table = table_of([huge, torch.zeros(1)])
    assert rows_of(table)[0, WORD["numel"]] == (1 << 32) + 1
    assert table.num_partials == (1 << 32) // CHUNK + 2
    (run,) = table.runs
    assert table.data[run.start + run.num_chunks - 2].item() == (1 << 32) // CHUNK
    assert rows_of(table)[1, WORD["first_partial"]] == (1 << 32) // CHUNK + 1


def test_no_tensors():
    table = table_of([], num_layers=2)
    assert table.runs == []
    assert table.data[table.layers_start : table.layers_start + 3].tolist() == [0, 0, 0]
