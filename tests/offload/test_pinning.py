"""Would catch: a slab that is pinned twice, or never unpinned; a failure that an unrelated call reports; pinned pages
that a data-loader worker copies when it is forked; a forked process that crashes, hangs, or unmaps memory of others,
when it drops the optimizer; a draw that waits for pinning, a copy that does not; an error of the background thread that
is lost, or raised inside an update; a thread that outlives its store.
"""

import ctypes
import errno
import gc
import mmap
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import grass
from grass.errors import OffloadError
from grass.offload.store import Bucket, Store, allocating
from tests.support import ragged, tiny

pytestmark = [
    pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

MOMENTS = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}


class Driver:
    """Stands for CUDA's runtime, which pins memory and is not available in a forked process."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.pinned: dict[int, int] = {}
        self.given_back: list[int] = []
        self.error = self.last_error = 0
        self.threads: list[str] = []
        self.twice: list[int] = []
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.may_end.set()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.threads.append(threading.current_thread().name)
        if address in self.pinned:
            self.twice.append(address)
        error = self.error
        self.begun.set()
        assert self.may_end.wait(10)
        if not error:
            self.pinned[address] = size
        self.last_error = error or self.last_error
        return error

    def cudaGetLastError(self) -> int:
        error, self.last_error = self.last_error, 0
        return error

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        self.given_back.append(address)
        return 0


def running_threads() -> list[str]:
    """The threads that pin memory, after they had time to end."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("grass-pin")]
    for thread in threads:
        thread.join(10)
    return [thread.name for thread in threads if thread.is_alive()]


def moments_of(*sizes: int) -> tuple[list[Tensor], Store]:
    """A pinned store with a bucket for each parameter."""
    params = [torch.zeros(size) for size in sizes]
    return params, Store([Bucket([p], dict(MOMENTS)) for p in params], pinned=True)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    stand_in = Driver()

    def cudart() -> Driver:
        if os.getpid() != stand_in.process:
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
        return stand_in

    monkeypatch.setattr(torch.cuda, "cudart", cudart)
    yield stand_in
    gc.collect()
    assert not running_threads(), "a thread outlives its store"
    assert not stand_in.twice, "memory was pinned twice"
    assert not stand_in.pinned, "memory was freed that is still pinned"


def test_a_slab_is_pinned_once_for_what_it_is(driver: Driver) -> None:
    p = torch.zeros(1000)
    store = Store([Bucket(list(members), dict(MOMENTS)) for members in [[p]]], pinned=True)
    assert not driver.pinned
    view = store.view(p, "exp_avg")
    store.slab(0)
    assert driver.pinned == {view.data_ptr(): 1024 * 8}
    store.pin()
    assert len(driver.pinned) == 1
    del store
    gc.collect()
    assert driver.pinned, "a view is left"
    del view
    gc.collect()
    assert len(driver.given_back) == 1


def test_a_store_is_pinned_late_when_parameters_move(driver: Driver) -> None:
    p, q = torch.zeros(10), torch.zeros(200)
    store = Store([Bucket(list(members), dict(MOMENTS)) for members in [[p], [q]]], pinned=False)
    view = store.view(p, "exp_avg")
    assert not driver.pinned
    store.pin()
    assert driver.pinned == {view.data_ptr(): 128 * 8}
    other = store.view(q, "exp_avg")
    store.slab(1)
    assert driver.pinned[other.data_ptr()] == 256 * 8


def test_memory_that_cannot_be_pinned_is_an_error_with_the_remedy(driver: Driver) -> None:
    driver.error = 2
    p = torch.zeros(1000)
    store = Store([Bucket(list(members), dict(MOMENTS)) for members in [[p]]], pinned=True)
    with pytest.raises(OffloadError, match=r"8,192 bytes .* could not be pinned \(CUDA error 2\).*ulimit -l"):
        store.slab(0)
    assert store.num_bytes == 0
    driver.error = 0
    store.slab(0)
    assert len(driver.pinned) == 1


@pytest.mark.parametrize("bound", [True, False])
def test_no_later_call_reports_that_memory_could_not_be_pinned(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, bound: bool
) -> None:
    """Fails if the last error stays set, with a runtime that can clear it, or a torch that checks kernel launches."""

    clear = driver.cudaGetLastError

    def launch(*size: Any, device: str) -> None:
        assert device == "cuda"
        if clear():
            raise torch.AcceleratorError("CUDA error: out of memory")

    if not bound:
        monkeypatch.delattr(Driver, "cudaGetLastError")
        monkeypatch.setattr(torch, "ones", launch)
    driver.error = 2
    with pytest.raises(OffloadError, match="could not be pinned"):
        Store([Bucket([torch.zeros(9)], dict(MOMENTS))], pinned=True).slab(0)
    assert driver.last_error == 0


# -- in the background --------------------------------------------------------------------------------------------


def test_states_are_there_while_a_thread_pins_them(driver: Driver) -> None:
    """Fails if a draw waits for pinning, or if what the host writes meanwhile is lost."""
    (p,), store = moments_of(1000)
    driver.may_end.clear()
    view = store.view(p, "exp_avg")
    assert driver.begun.wait(10), "it is pinned only when it is asked for"
    view.fill_(3.0)
    assert not store.is_ready(0)
    driver.may_end.set()
    assert bool((store.slab(0).view(p, "exp_avg") == 3.0).all())
    assert store.is_ready(0)
    assert driver.threads == ["grass-pin_0"]


def test_copies_wait_for_the_thread(driver: Driver) -> None:
    """Fails if a slab is copied before it is pinned, or pinned a second time."""
    (p,), store = moments_of(1000)
    driver.may_end.clear()
    store.view(p, "exp_avg")
    assert driver.begun.wait(10)
    threading.Timer(0.1, driver.may_end.set).start()
    assert store.slab(0).is_pinned
    assert len(driver.threads) == 1


def test_an_error_of_the_thread_is_raised_where_the_slab_is_needed(driver: Driver) -> None:
    """Fails if the error is lost, or if memory cannot be pinned any more after it."""
    (p,), store = moments_of(1000)
    driver.error = 2
    store.view(p, "exp_avg")
    store._background.shutdown()
    for _ in range(2):
        with pytest.raises(OffloadError, match="ulimit -l"):
            store.slab(0)
    driver.error = 0
    assert store.slab(0).is_pinned


def test_the_thread_ends_with_its_store(driver: Driver) -> None:
    """Fails if a thread pins memory for an optimizer that is gone, or waits for ever."""
    params, store = moments_of(1000, 1000, 1000)
    driver.may_end.clear()
    for p in params:
        store.view(p, "exp_avg")
    assert driver.begun.wait(10)
    del store
    gc.collect()
    driver.may_end.set()
    assert running_threads() == []
    assert len(driver.threads) == 1, "slabs of no store were pinned"


def test_there_is_no_thread_without_pinned_memory(driver: Driver) -> None:
    """Fails if a run on the CPU, or a plan on fake tensors, starts a thread."""
    (p,), store = moments_of(1000)
    with allocating(lambda num_bytes, pinned: torch.zeros(num_bytes, dtype=torch.uint8)):
        store.view(p, "exp_avg")
        assert store.is_ready(0)
    unpinned = Store([Bucket([p], dict(MOMENTS))], pinned=False)
    unpinned.view(p, "exp_avg")
    assert unpinned.is_ready(0)
    assert not driver.threads
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("grass-pin")]


FORMS = [(mode, fused) for mode in ("streamed", "resident") for fused in (False, True)]


@pytest.mark.parametrize(("mode", "fused"), FORMS)
@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_training_does_not_depend_on_the_thread(
    driver: Driver, mode: str, fused: bool, seconds: float
) -> None:
    """Fails if slow pinning changes a bit of a run, or if drawn layers are not pinned before their period."""

    def train(pinned: bool) -> dict[str, Any]:
        model = ragged.ragged()
        config = ragged.config(offload=mode, fused_backward=fused, sampler="cyclic")
        opt = grass.GrassAdamW(model, lr=1e-2, config=config, pattern="blocks.*")
        if pinned:
            opt._offload.store.pin()
        return ragged.outcome(model, opt, list(ragged.steps(model, opt, 0, 9)))

    expected = train(pinned=False)
    register = driver.cudaHostRegister

    def slow(*args: int) -> int:
        time.sleep(seconds)
        return register(*args)

    driver.cudaHostRegister = slow  # type: ignore[method-assign]
    tiny.assert_identical(train(pinned=True), expected)
    assert "grass-pin_0" in driver.threads


@pytest.mark.parametrize(("mode", "fused"), FORMS)
def test_an_error_leaves_no_step_half_done(driver: Driver, mode: str, fused: bool) -> None:
    """Fails if memory of drawn layers that cannot be pinned is an error at the draw, inside an update, or never."""

    def train(fails: bool) -> tuple[dict[str, Any], list[tuple[int, bool]]]:
        model = ragged.ragged()
        config = ragged.config(offload=mode, fused_backward=fused, sampler="cyclic")
        opt = grass.GrassAdamW(model, lr=1e-2, config=config, pattern="blocks.*")
        list(ragged.steps(model, opt, 0, 1))
        opt._offload.store.pin()
        errors = []
        for index in range(1, 9):
            driver.error = 2 if fails and not errors else 0
            model(index).backward()
            coming = opt.next_active_layers
            try:
                opt.step()
            except OffloadError:
                errors.append((index, opt.active_layers == coming))
            opt.zero_grad()
        return ragged.outcome(model, opt, []), errors

    expected, none = train(fails=False)
    found, errors = train(fails=True)
    assert none == []
    assert errors == [(2, True)]  # at the end of the step that switches to them
    tiny.assert_identical(found, expected)


# -- forked processes ---------------------------------------------------------------------------------------------


def in_child(work: Callable[[], Any]) -> Any:
    """The result of a function in a forked process, which must not crash."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(work()))
    child.start()
    child.join(30)
    assert child.exitcode == 0, f"the child ended with {child.exitcode}"
    return receiver.recv()


def mapping_of(address: int) -> tuple[int, int] | None:
    """Return the range of addresses that is mapped around one; a child's own allocations have other ranges."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, end = (int(part, 16) for part in line.split()[0].split("-"))
        if first <= address < end:
            return first, end
    return None


def place(address: int, size: int) -> ctypes.Array | None:
    """Map new memory where pinned memory was in the parent, as later allocations of a child may be.

    Returns:
        The memory; None if an allocation of the child is there already.
    """
    function = ctypes.CDLL(None, use_errno=True).mmap
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    no_replace = 0x100000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_replace
    if function(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) != address:
        assert ctypes.get_errno() == errno.EEXIST
        return None
    memory = (ctypes.c_char * size).from_address(address)
    memory[:] = b"x" * size
    return memory


def drop_in_child(held: list[Any], pinned: dict[int, int]) -> list[str]:
    """Drop what is held, and return the errors; memory of the child must stay."""
    gc.collect()  # what others have left
    errors: list[str] = []
    sys.unraisablehook = lambda event: errors.append(repr(event.exc_value))
    placed = [(place(address, size), size) for address, size in pinned.items()]
    held.clear()
    gc.collect()
    assert all(memory[:] == b"x" * size for memory, size in placed if memory is not None)
    return errors


def offloaded(mode: str) -> tuple[torch.nn.Module, grass.GrassAdamW]:
    """An optimizer whose store is pinned, as on a GPU, after some steps."""
    model = ragged.ragged()
    opt = grass.GrassAdamW(model, lr=1e-2, config=ragged.config(offload=mode), pattern="blocks.*")
    opt._offload.store.pin()
    list(ragged.steps(model, opt, 0, 5))
    opt._offload.store.pin()  # waits for the thread
    return model, opt


def test_pinned_memory_is_not_in_a_forked_process(driver: Driver) -> None:
    """Fails if a child copies pinned pages, or if the parent loses them."""
    p = torch.zeros(100_000)
    store = Store([Bucket([p], dict(MOMENTS))], pinned=True)
    view = store.slab(0).view(p, "exp_avg")
    view.fill_(3.0)
    inherited = mapping_of(view.data_ptr())
    assert inherited is not None
    assert in_child(lambda: mapping_of(view.data_ptr()) == inherited) is False
    assert bool((view == 3.0).all())


def test_memory_that_is_not_pinned_is_in_a_forked_process() -> None:
    """Fails if a child of a run on the CPU, which copies on write, cannot read the states."""
    p = torch.zeros(1000)
    store = Store([Bucket([p], dict(MOMENTS))], pinned=False)
    view = store.view(p, "exp_avg")
    view.fill_(3.0)
    assert in_child(lambda: view.sum().item()) == 3000.0


@pytest.mark.parametrize("mode", ["streamed", "resident"])
def test_a_forked_process_may_drop_the_optimizer(driver: Driver, mode: str) -> None:
    """Fails if a child's end of the optimizer uses CUDA, writes states back, or unmaps what is now at their place."""
    held = list(offloaded(mode))
    assert driver.pinned
    assert in_child(lambda: drop_in_child(held, driver.pinned)) == []
    assert len(held) == 2


def test_a_forked_process_waits_for_no_thread(driver: Driver) -> None:
    """Fails if a child hangs on memory that was being pinned when it was forked."""
    held = list(moments_of(1000, 1000))
    driver.may_end.clear()
    for p in held[0]:
        held[1].view(p, "exp_avg")
    assert driver.begun.wait(10)

    def use_and_drop() -> list[str]:
        with pytest.raises(RuntimeError, match="forked"):
            held[1].slab(0)
        return drop_in_child(held, {})

    assert in_child(use_and_drop) == []
    driver.may_end.set()
    held[1].pin()
    assert len(driver.pinned) == 2
    held.clear()


class Holding(Dataset):
    """Data that refer to the optimizer, and drop it in the worker."""

    def __init__(self, held: list[Any], driver: Driver) -> None:
        self.held, self.driver = held, driver
        self.mappings = {address: mapping_of(address) for address in driver.pinned}

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        mapped = 0
        if index == 0:
            mapped = sum(mapping_of(address) == mapping for address, mapping in self.mappings.items())
        errors = drop_in_child(self.held, self.driver.pinned if index == 0 else {})
        return torch.tensor([mapped, len(errors)])


@pytest.mark.parametrize("mode", ["streamed", "resident"])
def test_training_goes_on_beside_a_forked_data_loader_worker(driver: Driver, mode: str) -> None:
    """Fails if a worker crashes or copies pinned pages, or if the run differs from one without workers."""
    model, opt = offloaded(mode)
    expected = ragged.outcome(model, opt, list(ragged.steps(model, opt, 5, 9)))
    del opt
    held = list(offloaded(mode))
    loader = DataLoader(Holding(held, driver), num_workers=1, multiprocessing_context="fork")
    assert torch.cat(list(loader)).tolist() == [[0, 0], [0, 0]]
    found = ragged.outcome(*held, list(ragged.steps(*held, 5, 9)))
    tiny.assert_identical(found, expected)
