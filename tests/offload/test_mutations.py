"""Would catch: a wait missing in a pipeline, whatever schedule needs it; a wait that nothing needs any more; states
that differ from plain updates by a bit; an operation logged with other memory than it touches.

Each wait of the pipelines has a witness: a schedule in which it alone keeps two operations apart.
"""

import ast
import copy
import functools
import inspect
import weakref
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grass
from bench.offload.order import conflicts
from bench.offload.recording import RecordingEngine
from grass.offload import pipeline as pipelines
from grass.offload.store import ALIGNMENT, Bucket, Store
from grass.offload.streams import COMPUTE, InlineEngine, Operation
from grass.optim.offload_manager import OffloadManager
from grass_kernels.table import CHUNK
from tests.support import tiny

pytestmark = pytest.mark.plain_only(reason="not about kernels, and slow in the interpreter")

KINDS = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
ONE_CHUNK = 8 * CHUNK + 2 * ALIGNMENT  # bytes of a buffer


class TrueNames(InlineEngine):
    """Notes where each named memory is, as copies touch it."""

    def __init__(self):
        self.places = {}

    def copy(self, queue, targets, sources, operation):
        super().copy(queue, targets, sources, operation)
        for names, tensors in ((operation.writes, targets), (operation.reads, sources)):
            (name,) = names
            self.places.setdefault(name, set()).update(
                (t.data_ptr(), t.data_ptr() + t.numel() * t.itemsize) for t in tensors
            )

    def check(self):
        places = sorted((start, end, name) for name, found in self.places.items() for start, end in found)
        reach, owner = 0, None
        for start, end, name in places:
            assert start >= reach or name == owner
            if end > reach:
                reach, owner = end, name


class Harness:
    """A pipeline under a recording engine, beside plain updates of the same states.

    Args:
        sizes: elements of each parameter, by slot.
        buffers: of a ring, each for a chunk; 0 is a resident pipeline.
        ignore: hazards; see `RecordingEngine`.
        module: where the pipelines are, or mutants of them.
        used: memory that is in use on the device when the pipeline is made.
    """

    def __init__(self, sizes, buffers, ignore=frozenset(), module=pipelines, used=()):
        self.params = [[torch.zeros(n) for n in numbers] for numbers in sizes]
        self.store = Store([Bucket(list(members), dict(KINDS)) for members in self.params], pinned=False)
        self.names = TrueNames()
        self.engine = RecordingEngine(self.names, ignore)
        self.engine.note(COMPUTE, Operation("user", "", used, used))
        device = torch.device("cpu")
        if buffers:
            self.pipeline = module.StreamedPipeline(self.store, self.engine, device, ONE_CHUNK, buffers)
        else:
            self.pipeline = module.ResidentPipeline(self.store, self.engine, device)
        self.plain = [
            {kind: self.section(slot, kind).clone() for kind in KINDS} for slot in range(len(sizes))
        ]
        self.updates = 0

    def section(self, slot, kind):
        return self.store.slab(slot).sections[kind]

    def begin(self, *slots):
        self.pipeline.begin(slots)

    def announce(self, *slots):
        self.pipeline.announce(slots)

    def run(self, slot):
        self.pipeline.join()  # a forward came before
        self.update(slot)

    def update(self, slot):
        self.updates += 1

        def update(unit, views):
            n = views["exp_avg"].numel()
            advance(views, torch.arange(unit.start, unit.start + n) + self.updates)

        self.engine.note(COMPUTE, Operation("backward", "", (), (f"gradients {slot}",)))
        with self.pipeline.updating():
            self.pipeline.run(slot, update)
        plain = self.plain[slot]
        advance(plain, torch.arange(plain["exp_avg"].numel()) + self.updates)

    def backward(self, *slots):
        """A backward that updates these slots, and frees their gradients."""
        self.pipeline.join()
        for slot in dict.fromkeys(slots):
            self.update(slot)
            self.pipeline.hold(slot, [torch.zeros_like(p) for p in self.params[slot]])

    def join(self):
        self.pipeline.join()

    def forward(self, slot):
        self.pipeline.join()
        self.engine.note(COMPUTE, Operation("forward", "", (f"weights {slot}",), ()))

    def step(self, *slots):
        for slot in slots:
            self.run(slot)
        self.begin(*slots)
        for slot in slots:
            self.forward(slot)

    def drain(self):
        self.pipeline.drain()
        self.compare()

    def forget(self):
        self.pipeline.invalidate()
        self.compare()

    def close(self):
        self.pipeline.close()
        self.compare()

    def forget_one(self, slot):
        self.pipeline.invalidate(slot)
        self.compare(slot)

    def write(self, slot):
        self.forget_one(slot)
        for kind in KINDS:
            self.section(slot, kind).add_(1)
            self.plain[slot][kind].add_(1)

    def compare(self, only=None):
        for slot, params in enumerate(self.params):
            if only not in (None, slot):
                continue
            for p in params:
                start = self.store.slab(slot).starts[p]
                for kind in KINDS:
                    mine = self.section(slot, kind)[start : start + p.numel()]
                    assert torch.equal(mine, self.plain[slot][kind][start : start + p.numel()])

    def conflicts(self):
        self.names.check()
        return conflicts(self.engine.log)


def advance(states, number):
    """A step of moments; elementwise, so that cutting changes no bit."""
    grad = number.float().sin()
    states["exp_avg"].lerp_(grad, 0.1)
    states["exp_avg_sq"].mul_(0.9).addcmul_(grad, grad, value=0.1)


class Witness(NamedTuple):
    name: str
    hazard: str
    buffers: int  # 0: resident
    schedule: list
    used: tuple[str, ...] = ()


def do(name, *slots):
    return name, slots


RESIDENT = 0
WITNESSES = [
    Witness("the first update", "H1", 2, [do("begin", 0), do("run", 0)]),
    Witness("the first write-back", "H2", 2, [do("begin", 0), do("run", 0)]),
    Witness("a ring of one", "H3:d2h", 1, [do("run", 0), do("run", 1)]),
    Witness("a ring in used memory", "H3:compute", 2, [do("begin", 0)], ("buffer 0",)),
    # A ring of one would wait by H3; in three buffers the unit comes back into another one.
    Witness("a unit that comes back soon", "H4", 3, [do("step", 0)]),
    Witness("gradients of the first backward", "H7", 2, [do("begin", 0), do("run", 0)]),
    Witness("the next forward", "H8", 2, [do("run", 0), do("forward", 0)]),
    Witness("gradients freed behind the next", "H11", 2, [do("backward", 0, 2)]),
    Witness("gradients freed at the end", "H8", 2, [do("backward", 0), do("join")]),
    Witness("a checkpoint", "H5", 2, [do("run", 0), do("drain")]),
    Witness("loading behind write-backs", "H6:d2h", 2, [do("run", 0), do("forget")]),
    Witness("loading below fetches", "H6:h2d", 2, [do("begin", 0), do("forget")]),
    Witness("loading below fetches for nothing", "H6:h2d", 2, [do("begin", 0), do("begin"), do("forget")]),
    Witness("one slot's loading behind write-backs", "H6:d2h", 2, [do("run", 0), do("forget_one", 0)]),
    Witness("one slot's loading below fetches", "H6:h2d", 2, [do("begin", 0), do("forget_one", 0)]),
    Witness("the end behind write-backs", "H6:d2h", 2, [do("run", 0), do("close")]),
    Witness("the end below fetches", "H6:h2d", 2, [do("begin", 0), do("begin"), do("close")]),
    Witness("resident: the first update", "H1", RESIDENT, [do("begin", 0), do("run", 0)]),
    Witness("resident: a checkpoint's copy", "H2", RESIDENT, [do("run", 0), do("drain")]),
    Witness("resident: a switch", "H3:d2h", RESIDENT, [do("run", 0), do("begin", 1)]),
    Witness("resident: in used memory", "H3:compute", RESIDENT, [do("begin", 0)], ("slab 0",)),
    # Bucket 2 is larger: its buffer holds slot 0 first, and then slot 0 comes back into that of slot 1.
    Witness(
        "resident: back into another buffer",
        "H4",
        RESIDENT,
        [
            do("begin", 2),
            do("begin", 0),
            do("announce", 1),
            do("run", 0),
            do("announce"),
            do("begin"),
            do("announce", 0),
        ],
    ),
    Witness("resident: a checkpoint", "H5", RESIDENT, [do("run", 0), do("drain")]),
    Witness(
        "resident: loading behind write-backs", "H6:d2h", RESIDENT, [do("run", 0), do("begin"), do("forget")]
    ),
    Witness("resident: the end behind write-backs", "H6:d2h", RESIDENT, [do("run", 0), do("close")]),
    Witness("resident: the end below fetches", "H6:h2d", RESIDENT, [do("begin", 0), do("close")]),
    Witness("resident: one slot's loading", "H6:h2d", RESIDENT, [do("begin", 0), do("forget_one", 0)]),
    Witness("resident: loading below fetches", "H6:h2d", RESIDENT, [do("begin", 0), do("forget")]),
    Witness(
        "resident: loading below fetches for nothing",
        "H6:h2d",
        RESIDENT,
        [do("announce", 0), do("begin"), do("forget")],
    ),
]
SIZES = [[CHUNK], [CHUNK], [CHUNK + 5]]
every_witness = pytest.mark.parametrize("witness", WITNESSES, ids=lambda w: f"{w.hazard}, {w.name}")


def conflicts_of(witness, ignore=frozenset(), module=pipelines):
    harness = Harness(SIZES, witness.buffers, ignore, module, witness.used)
    for name, slots in witness.schedule:
        getattr(harness, name)(*slots)
    return harness.conflicts()


@every_witness
def test_a_witness_has_no_conflict(witness):
    assert [str(conflict) for conflict in conflicts_of(witness)] == []


@every_witness
def test_without_the_wait_there_is_a_conflict(witness):
    assert conflicts_of(witness, {witness.hazard})


class RemoveWait(ast.NodeTransformer):
    """Takes the n-th wait out of the source."""

    def __init__(self, number):
        self.number, self.seen, self.removed = number, 0, None

    def visit_Expr(self, node):
        call = node.value
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "wait":
            self.seen += 1
            if self.seen - 1 == self.number:
                self.removed = ast.unparse(node)
                return ast.copy_location(ast.Pass(), node)
        return node


def mutant(number):
    remover = RemoveWait(number)
    tree = remover.visit(ast.parse(inspect.getsource(pipelines)))
    return tree, remover


WAITS = [mutant(number)[1].removed for number in range(mutant(-1)[1].seen)]


@pytest.mark.parametrize("number", range(len(WAITS)), ids=WAITS)
def test_every_wait_in_the_source_has_a_witness(number):
    tree, _ = mutant(number)
    module = type(pipelines)("mutant")
    exec(compile(tree, "mutant", "exec"), module.__dict__)
    assert any(conflicts_of(witness, module=module) for witness in WITNESSES)


def test_every_hazard_of_the_source_is_a_witness_s():
    source = ast.parse(inspect.getsource(pipelines))
    constants = {node.value for node in ast.walk(source) if isinstance(node, ast.Constant)}
    hazards = {f"H{n}" for n in range(1, 12)} & constants
    assert hazards == {witness.hazard.split(":")[0] for witness in WITNESSES}


numbers = st.sampled_from([5, 130, CHUNK, CHUNK + 5, 2 * CHUNK + 9])
models = st.lists(st.lists(numbers, min_size=1, max_size=3), min_size=1, max_size=4)


@st.composite
def schedules(draw):
    """A model, a ring or none, and what is done: steps as an optimizer takes them, and calls in any order."""
    sizes = draw(models)
    slots = st.integers(0, len(sizes) - 1)
    sets = st.lists(slots, unique=True, max_size=len(sizes))
    action = st.one_of(
        st.builds(lambda s: do("step", *s), sets),
        st.builds(lambda s: do("backward", *s), sets),
        st.builds(lambda s: do("begin", *s), sets),
        st.builds(lambda s: do("announce", *s), sets),
        st.builds(lambda s: do("run", s), slots),
        st.builds(lambda s: do("write", s), slots),
        st.builds(lambda s: do("forget_one", s), slots),
        st.sampled_from([do("drain"), do("forget")]),
    )
    return sizes, draw(st.integers(0, 4)), draw(st.lists(action, max_size=12))


@settings(max_examples=150, deadline=None)
@given(schedules())
def test_no_schedule_has_a_conflict_and_states_are_those_of_plain_updates(case):
    sizes, buffers, schedule = case
    harness = Harness(sizes, buffers)
    for name, slots in schedule:
        getattr(harness, name)(*slots)
    harness.drain()
    harness.close()
    assert [str(conflict) for conflict in harness.conflicts()] == []


@pytest.mark.parametrize("fused_backward", [False, True])
@pytest.mark.parametrize("moments", ["keep", "reset"])
@pytest.mark.parametrize(
    "mode",
    [
        {"offload": "resident"},
        *({"offload": "streamed", "buffer_count": n, "buffer_mb": 0.2} for n in (1, 2, 3)),
    ],
    ids=["resident", "one buffer", "two buffers", "three buffers"],
)
def test_the_optimizer_s_own_schedule_has_no_conflict(monkeypatch, mode, moments, fused_backward):
    engines = []

    def record(device):
        engines.append(RecordingEngine())
        return engines[-1]

    made_with = functools.partialmethod(OffloadManager.__init__, engine=record)
    monkeypatch.setattr(OffloadManager, "__init__", made_with)
    model = tiny.stack(width=64)  # layers of two units
    options = {"sample_interval": 2, "update_interval": 4, "probe_steps": 2}
    config = tiny.config(**mode, **options, moments=moments, fused_backward=fused_backward)
    optimizer = grass.GrassAdamW(model, lr=1e-2, config=config)
    tiny.train(model, optimizer, 0, 8)
    saved = copy.deepcopy(optimizer.state_dict())
    tiny.train(model, optimizer, 8, 11)
    optimizer.load_state_dict(saved)
    tiny.train(model, optimizer, 11, 16)
    (engine,) = engines
    assert {entry.operation.kind for entry in engine.log.entries} >= {"update", "host read", "host write"}
    assert [str(conflict) for conflict in conflicts(engine.log)] == []


def test_gradients_are_held_until_the_next_bucket_and_no_longer():
    """Would catch gradients that outlive the wait for their update, and a wait before memory needs it."""
    harness = Harness([[CHUNK], [5], [CHUNK], [CHUNK // 2]], 2)
    grads = {}

    def alive():
        return [slot for slot, grad in grads.items() if grad() is not None]

    held = []
    for slot in (0, 1, 2, 3):
        harness.update(slot)
        (p,) = harness.params[slot]
        grad = torch.zeros_like(p)
        grads[slot] = weakref.ref(grad)
        harness.pipeline.hold(slot, [grad])
        del grad
        held.append(alive())
    # A bucket of 5 elements does not make the large one wait; the next large one does.
    assert held == [[0], [0, 1], [1, 2], [3]]
    harness.pipeline.join()
    assert alive() == []
