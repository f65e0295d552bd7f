"""Clocks: seconds of one step with cold caches, on the host or on the device."""

import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

ROOF_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}


class Sample(NamedTuple):
    """One measurement.

    Args:
        seconds: time of the step.
        host_late: whether the device may have waited for the host.
        sleep: seconds that the device slept before, so that the host gets ahead.
    """

    seconds: float
    host_late: bool = False
    sleep: float = 0.0


class Clock(Protocol):
    """Time steps on a device."""

    device: torch.device

    def sample(self, step: Callable[[], object], previous: Sample | None = None) -> Sample:
        """Flush the caches and time one step, of which `previous` was the last sample."""
        ...

    def flush(self) -> None:
        """Displace what caches hold."""
        ...

    def peak_bytes(self, step: Callable[[], object]) -> int | None:
        """Take a step, and return its peak memory above the memory allocated before, in bytes; None if unknown."""
        ...


class CpuClock:
    """Wall time.

    Args:
        flush_bytes: bytes written before each sample; None is twice the size of the last cache.
    """

    device = torch.device("cpu")

    def __init__(self, flush_bytes: int | None = None) -> None:
        num_bytes = 2 * cpu_cache_bytes() if flush_bytes is None else flush_bytes
        self._buffer = torch.zeros(max(1, num_bytes), dtype=torch.uint8)

    def flush(self) -> None:
        """Displace what caches hold."""
        self._buffer.add_(1)

    def sample(self, step: Callable[[], object], previous: Sample | None = None) -> Sample:
        """Flush the caches and time one step."""
        self.flush()
        start = time.perf_counter()
        step()
        return Sample(time.perf_counter() - start)

    def peak_bytes(self, step: Callable[[], object]) -> None:
        """Take a step, and return None: memory of a CPU is not measured."""
        step()


def cycles_per_second() -> float:
    """Measure the rate of the clock of ``torch.cuda._sleep``."""
    cycles = 20_000_000
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)  # the first wakes the clocks
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    return cycles / (start.elapsed_time(end) / 1e3)


class CudaClock:
    """Time between events on the device, with the host ahead.

    Many launches, or tables made on the host, take longer to enqueue than to run. The device therefore sleeps
    first, until everything is enqueued; if the sleep was over before, the sample is taken again with a
    longer one. In a step that waits for the device the host is never ahead: after a few doublings its sample
    counts as it is, and says so.
    """

    _FIRST_SLEEP, _LONGEST_SLEEP = 1e-3, 0.3  # seconds

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        self._buffer = torch.zeros(max(256 << 20, 3 * cache) // 4, dtype=torch.int32, device=self.device)
        self._cycles_per_second = cycles_per_second()

    def flush(self) -> None:
        """Displace what caches hold."""
        self._buffer.zero_()

    def sample(self, step: Callable[[], object], previous: Sample | None = None) -> Sample:
        """Flush the caches and time one step, of which `previous` was the last sample."""
        sleep = self._FIRST_SLEEP if previous is None else previous.sleep
        hopeless = previous is not None and previous.host_late
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            self.flush()
            torch.cuda._sleep(int(sleep * self._cycles_per_second))
            start.record()
            step()
            end.record()
            late = start.query()  # the sleep was over, so the device may have run dry
            end.synchronize()
            if not late:
                return Sample(start.elapsed_time(end) / 1e3, False, sleep)
            if hopeless or sleep >= self._LONGEST_SLEEP:
                return Sample(start.elapsed_time(end) / 1e3, True, self._FIRST_SLEEP)
            sleep = min(2 * sleep, self._LONGEST_SLEEP)

    def peak_bytes(self, step: Callable[[], object]) -> int:
        """Take a step, and return its peak memory above the memory allocated before, in bytes."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def make_clock() -> Clock:
    """Return a clock of the CUDA device if there is one, otherwise of the CPU."""
    return CudaClock() if torch.cuda.is_available() else CpuClock()


class Roof:
    """Copies on the device: no update can be faster than moving its bytes.

    Args:
        device: to copy on.
        num_bytes: what the largest copy moves is twice this: read and written.
    """

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self.source = torch.zeros(max(1, num_bytes), dtype=torch.uint8, device=device)
        self.target = torch.zeros_like(self.source)

    @property
    def moved_bytes(self) -> int:
        """Bytes moved by the largest copy."""
        return 2 * self.source.numel()

    def copy(self, moved_bytes: int) -> tuple[Callable[[], object], int]:
        """Return a copy that moves about this many bytes, at most `moved_bytes`, and the bytes it moves."""
        numel = min(max(1, moved_bytes // 2), self.source.numel())
        source, target = self.source[:numel], self.target[:numel]
        return lambda: target.copy_(source), 2 * numel


def cpu_cache_bytes() -> int:
    """Return the size of the CPU's last cache in bytes, clamped to 32 to 256 MiB; 32 MiB if unknown."""
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            sizes.append(int(path.read_text().strip().rstrip("K")) << 10)
        except (OSError, ValueError):  # not readable, or in another unit
            continue
    return min(max(sizes), 256 << 20)


def interleaved(
    steps: Mapping[str, Callable[[], object]],
    seconds: float,
    *,
    prepare: Callable[[str], object] = lambda name: None,
    repeats: int = 1,
) -> dict[str, list[float]]:
    """Time steps interleaved: each once per turn, in at least three turns.

    Args:
        steps: functions by name.
        seconds: approximate total time.
        prepare: called with the name before each sample, untimed.
        repeats: steps per sample.

    Returns:
        Seconds of one step by name, a sample per turn.
    """
    shuffle = random.Random(0).shuffle  # what comes after a long step finds colder caches
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    turns = 0
    while turns < 3 or time.perf_counter() < end:
        turns += 1
        shuffle(names)
        for name in names:
            step = steps[name]
            prepare(name)
            start = time.perf_counter()
            for _ in range(repeats):
                step()
            times[name].append((time.perf_counter() - start) / repeats)
    return times


def quantile(values: Sequence[float], q: float) -> float:
    """Return the q-quantile, interpolated linearly."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def statistics(seconds: Sequence[float]) -> dict[str, Any]:
    """Return the columns of samples: median, quantiles, minimum and number."""
    return {
        "seconds_median": quantile(seconds, 0.5),
        "seconds_p20": quantile(seconds, 0.2),
        "seconds_p80": quantile(seconds, 0.8),
        "seconds_min": min(seconds),
        "samples": len(seconds),
    }


def device_name(device: torch.device) -> str:
    """Return the model of the device; for a CPU with the number of threads of torch."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{model}, {torch.get_num_threads()} threads"
