"""Failures these tests catch: a device that waits for the host and is timed doing so, without a word; a sleep that
grows for ever, or starts over at each sample; caches that are warm.
"""

import torch

from bench.kernels.timing import CpuClock, CudaClock, Roof, Sample, cpu_cache_bytes, device_name


class FakeCuda:
    """A device whose sleeps cover a host that needs `host_seconds`; of a step that waits for it, none does."""

    def __init__(self, monkeypatch, host_seconds=0.0, step_waits=False):
        self.log = []
        self.slept = 0.0
        outer = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                outer.log.append("record")

            def query(self):
                return step_waits or outer.slept < host_seconds

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return 4.0  # milliseconds

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep, raising=False)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        self.clock = CudaClock.__new__(CudaClock)
        self.clock.device = torch.device("cpu")
        self.clock._cycles_per_second = 1e6
        self.clock._buffer = torch.zeros(4)
        monkeypatch.setattr(self.clock, "flush", lambda: self.log.append("flush"))

    def sleep(self, cycles):
        self.slept = cycles / 1e6
        self.log.append("sleep")

    def sample(self, previous=None):
        self.log.clear()
        return self.clock.sample(lambda: self.log.append("step"), previous)


def test_the_device_sleeps_between_the_flush_and_the_step(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    assert cuda.sample() == Sample(4e-3, False, CudaClock._FIRST_SLEEP)
    assert cuda.log == ["flush", "sleep", "record", "step", "record"]


def test_a_sleep_that_was_too_short_is_repeated_longer_and_remembered(monkeypatch):
    cuda = FakeCuda(monkeypatch, host_seconds=0.01)
    sample = cuda.sample()
    assert not sample.host_late
    assert 0.01 <= sample.sleep < 0.02
    assert cuda.log.count("step") == 5
    again = cuda.sample(sample)
    assert again == sample
    assert cuda.log.count("step") == 1


def test_a_step_that_waits_for_the_device_is_told_and_not_tried_again(monkeypatch):
    cuda = FakeCuda(monkeypatch, step_waits=True)
    sample = cuda.sample()
    assert sample.host_late
    assert cuda.log.count("step") < 15
    again = cuda.sample(sample)
    assert again.host_late
    assert cuda.log.count("step") == 1


def test_a_cpu_sample_begins_with_cold_caches(monkeypatch):
    clock = CpuClock(flush_bytes=16)
    order = []
    monkeypatch.setattr(clock, "flush", lambda: order.append("flush"))
    sample = clock.sample(lambda: order.append("step"))
    assert order == ["flush", "step"]
    assert sample.seconds > 0
    assert not sample.host_late


def test_a_flush_writes_more_than_the_cache():
    assert CpuClock()._buffer.numel() >= 2 * cpu_cache_bytes() >= 64 << 20


def test_a_copy_moves_what_it_says():
    roof = Roof(torch.device("cpu"), 1000)
    roof.source.fill_(7)
    step, moved = roof.copy(600)
    step()
    assert moved == 600
    assert roof.target.tolist() == [7] * 300 + [0] * 700
    assert roof.copy(10**9)[1] == roof.moved_bytes == 2000


def test_the_device_has_a_name():
    assert "threads" in device_name(torch.device("cpu"))
