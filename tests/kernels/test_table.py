"""Chunk tables and inputs.

Would catch: a chunk missing or listed twice; a tensor's chunks moved to another launch; partial sums of one
layer that overlap another's, or change places with the company they are in; addresses or positions cut to 32
bits; inputs that are uploaded although nothing changed, or not although something did; a staging slot
written before the copy that reads it has finished; a captured copy whose slot a later step writes.
"""

import random
import struct

import pytest
import torch

from grass_kernels import _triton, inputs
from grass_kernels.inputs import NUM_STAGING_BUFFERS, WORDS, Hyperparameters, Inputs, split_lr
from grass_kernels.table import CHUNK, COLUMNS, build_table

WORD = {name: position for position, name in enumerate(COLUMNS)}
CPU = torch.device("cpu")


def rows_of(table):
    return table.data[: table.num_tensors * len(COLUMNS)].view(-1, len(COLUMNS))


def table_of(numels, layers=None, num_layers=None, keys=None, **columns):
    layers = layers or [0] * len(numels)
    return build_table(
        numels=numels, keys=keys or ["one"] * len(numels), layers=layers,
        num_layers=num_layers or max(layers, default=0) + 1, device=CPU, columns=columns,
    )  # fmt: skip


def test_every_chunk_once_and_by_key():
    sizes = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]
    numels = [n for n in sizes for _ in range(2)]
    keys = ["even", "odd"] * len(sizes)
    table = table_of(numels, keys=keys)
    seen = []
    for key, start, count in table.runs:
        for word in table.data[start : start + count].tolist():
            tensor, chunk = word >> 32, word & 0xFFFFFFFF
            assert keys[tensor] == key
            seen.append((tensor, chunk))
    expected = [(i, c) for i, n in enumerate(numels) for c in range(-(-n // CHUNK))]
    assert sorted(seen) == expected
    assert table.num_partials == len(expected)
    assert len(table.runs) == 2


def test_rows_hold_what_they_are_given():
    rows = rows_of(table_of([3, 5], [1, 0], param=[1 << 40, 7], seed=[8, (1 << 62) + 1], group=[0, 2]))
    assert rows[:, WORD["param"]].tolist() == [1 << 40, 7]
    assert rows[:, WORD["seed"]].tolist() == [8, (1 << 62) + 1]
    assert rows[:, WORD["group"]].tolist() == [0, 2]
    assert rows[:, WORD["exp_avg"]].tolist() == [0, 0]
    assert rows[:, WORD["numel"]].tolist() == [3, 5]
    assert rows[:, WORD["layer"]].tolist() == [1, 0]


def test_partial_sums_of_a_layer_are_one_run_in_list_order():
    sizes = [CHUNK + 1, 1, 2 * CHUNK, 0, 5]
    table = table_of(sizes, [2, 0, 2, 1, 0], 4)
    bounds = table.data[table.layers_start : table.layers_start + 5].tolist()
    assert bounds == [0, 2, 2, 6, 6]
    assert rows_of(table)[:, WORD["first_partial"]].tolist() == [2, 0, 4, 2, 1]


def test_sizes_beyond_32_bits():
    huge = (1 << 32) + 1
    table = table_of([huge, 1])
    assert rows_of(table)[0, WORD["numel"]] == huge
    assert table.num_partials == (1 << 32) // CHUNK + 2
    (run,) = table.runs
    assert table.data[run.start + run.num_chunks - 2].item() == (1 << 32) // CHUNK
    assert rows_of(table)[1, WORD["first_partial"]] == (1 << 32) // CHUNK + 1


def test_no_tensors():
    table = table_of([], num_layers=2)
    assert table.runs == []
    assert table.data[table.layers_start : table.layers_start + 3].tolist() == [0, 0, 0]


# -- inputs ---------------------------------------------------------------------------------------------


def group(lr=0.1, **changes):
    return Hyperparameters(*split_lr(lr, CPU), (0.9, 0.999), 1e-8, 0.01)._replace(**changes)


def header(data, start):
    words = data[start : start + len(WORDS)].tolist()
    values = struct.unpack(f"{len(WORDS)}d", struct.pack(f"{len(WORDS)}q", *words))
    return dict(zip(WORDS, values, strict=True)), dict(zip(WORDS, words, strict=True))


@pytest.fixture
def copies(monkeypatch):
    made = []

    def copy(target, source):
        made.append((target, source))
        target.copy_(source)

    monkeypatch.setattr(inputs, "copy_to_device", copy)
    return made


def test_uploads_only_what_changed(copies):
    buffer = Inputs(3, 2, CPU)
    groups = [group(), group(weight_decay=0.5)]
    buffer.upload([11, 12, 13], groups)
    buffer.upload([11, 12, 13], list(groups))
    assert len(copies) == 1
    buffer.upload([11, 12, 13], [group(lr=0.2), groups[1]])
    assert len(copies) == 2
    assert copies[1][0].numel() == 2 * len(WORDS)  # headers alone
    buffer.upload([11, 12, 99], [group(lr=0.2), groups[1]])
    assert len(copies) == 3
    assert copies[2][0].numel() == 3  # addresses alone
    assert buffer.data[:3].tolist() == [11, 12, 99]
    first, second = (header(buffer.data, 3 + i * len(WORDS))[0] for i in range(2))
    assert first["lr"] == 0.2
    assert second["lr"] == 0.1
    assert (first["weight_decay"], second["weight_decay"]) == (0.01, 0.5)


def test_any_order_of_changes_leaves_what_was_given_last(copies):
    """A staging buffer has old values in the part that did not change: they must not be copied."""
    random_ = random.Random(0)
    buffer, addresses, groups = Inputs(2, 2, CPU), [1, 2], [group(), group()]
    for step in range(10 * NUM_STAGING_BUFFERS):
        change = random_.randrange(4)
        if change & 1:
            addresses[random_.randrange(2)] = step
        if change & 2:
            groups[random_.randrange(2)] = group(lr=step / 10)
        buffer.upload(list(addresses), list(groups))
        assert buffer.data[:2].tolist() == addresses
        found = [header(buffer.data, 2 + i * len(WORDS))[0]["lr"] for i in range(2)]
        assert found == [each.lr for each in groups]


@pytest.mark.parametrize("given", [[], [1], [1, 2, 3]])
def test_addresses_of_another_number_are_refused(given):
    """Fewer would leave old ones in place, more would be written beyond the end."""
    buffer = Inputs(2, 1, CPU, capturable=True)
    buffer.upload([1, 2], [group()])
    with pytest.raises(struct.error, match="expected 2 items"):
        buffer.upload(given, [group()])
    with pytest.raises(struct.error, match="expected 2 items"):
        buffer.for_graph(given, [group()])


def test_words_are_doubles():
    values, _ = header_of(group(lr=1e-5, betas=(0.9, 0.99999), maximize=True, max_grad_norm=0.7))
    assert values["lr"] == 1e-5
    assert values["one_minus_beta2"] == 1 - 0.99999
    assert values["sign"] == -1.0
    assert values["max_grad_norm"] == 0.7


def header_of(hyperparameters):
    buffer = Inputs(0, 1, CPU)
    buffer.upload([], [hyperparameters])
    return header(buffer.data, 0)


def test_a_learning_rate_on_the_device_is_an_address(monkeypatch):
    """Meta memory stands for a device's: only its address is taken."""
    assert split_lr(torch.tensor(0.5, dtype=torch.float64), CPU) == (0.5, 0, False)
    meta = torch.device("meta")
    monkeypatch.setattr(_triton, "runs_triton", lambda device: device == meta)
    value, address, is_double = split_lr(torch.tensor(0.5, device=meta, dtype=torch.float64), meta)
    assert (value, address, is_double) == (0.0, 0, True)
    words = header_of(group()._replace(lr_address=1 << 40, lr_is_double=True))[1]
    assert words["lr_address"] == 1 << 40
    assert words["lr_is_double"] == 1


def test_a_staging_buffer_is_written_after_the_copy_that_read_it(monkeypatch):
    """With copies that happen late, as on a device, every copy must still find what it was to copy."""
    pending, events = [], []

    def finish(event):
        while pending and pending[0][0] <= event:
            _, target, source, expected = pending.pop(0)
            assert torch.equal(source, expected), "a buffer was written before its copy"
            target.copy_(source)

    monkeypatch.setattr(
        inputs,
        "copy_to_device",
        lambda target, source: pending.append((len(events), target, source, source.clone())),
    )

    def record(device, event):
        events.append(len(events))
        return events[-1]

    monkeypatch.setattr(inputs, "record_event", record)
    monkeypatch.setattr(inputs, "wait_for_event", finish)
    buffer = Inputs(1, 1, CPU)
    for step in range(5 * NUM_STAGING_BUFFERS):
        buffer.upload([step], [group(lr=step / 10)])
    assert 0 < len(pending) <= NUM_STAGING_BUFFERS
    finish(len(events))
    assert buffer.data[0] == 5 * NUM_STAGING_BUFFERS - 1


def test_a_graph_reads_a_buffer_of_its_own(copies):
    buffer = Inputs(1, 1, CPU, capturable=True)
    buffer.upload([1], [group()])
    data, kept = buffer.for_graph([2], [group()])
    own = kept[0]
    for step in range(3 * NUM_STAGING_BUFFERS):
        buffer.upload([100 + step], [group(lr=step / 10)])
    assert own.words[0] == 2  # what a replay would copy
    assert data[0] == 2
    other, _ = buffer.for_graph([3], [group()])
    with pytest.raises(RuntimeError, match="take one step that is not captured"):
        buffer.for_graph([4], [group()])
    assert own.words[0] == 2
    assert other.data_ptr() != data.data_ptr()
