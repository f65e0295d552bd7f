"""Progress output of a run: lines and a progress bar on stderr."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

# Libraries whose warnings do not concern the user of a command.
_NOISY = (
    "torch",
    "transformers",
    "accelerate",
    "huggingface_hub",
    "tokenizers",
    "matplotlib",
    "safetensors",
    "datasets",
    "trl",
)


class Screen:
    """Lines and a progress bar on stderr; stdout is for results."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._reported = 0

    def say(self, line: str) -> None:
        """Print a line, above the progress bar if there is one."""
        tqdm.write(line, file=sys.stderr)

    def start(self, title: str, total: int, done: int = 0, unit: str = "step", delay: float = 0.0) -> None:
        """Start a progress bar; if stderr is not a terminal, print a line at every tenth of the total instead.

        Args:
            title: title of the bar.
            total: number of units.
            done: number of units that are done.
            unit: name of a unit.
            delay: show nothing in the first seconds, for what may be over by then.
        """
        self.stop()
        self._first_line = time.monotonic() + delay
        layout = "{desc} {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        # disable=None: disabled if stderr is not a terminal
        self._bar = tqdm(
            desc=title,
            total=total,
            initial=done,
            unit=unit,
            file=sys.stderr,
            disable=None,
            bar_format=layout,
            delay=delay,
        )
        self._title, self._total, self._done, self._note = title, total, done, ""
        self._reported = done * 10 // max(1, total)

    def note(self, text: str) -> None:
        """Show a text at the end of the progress bar."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def advance(self, count: int = 1) -> None:
        """Advance the progress bar."""
        if self._bar is None:
            return
        self._done += count
        self._bar.update(count)
        if self._bar.disable and self._done * 10 // max(1, self._total) > self._reported:
            self._reported = self._done * 10 // max(1, self._total)
            if time.monotonic() >= self._first_line:
                print(f"{self._title} {self._done}/{self._total} {self._note}".rstrip(), file=sys.stderr)

    def stop(self) -> None:
        """Close the progress bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence progress bars, log messages and warnings of other libraries inside the context."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise tokenizers warns at every fork
    import datasets
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in ("accelerate", "huggingface_hub", "datasets", "trl")]
    levels = [logger.level for logger in loggers]
    datasets.disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for module in _NOISY:
                warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
