"""Options of a reproduction."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from grass.config import check_choices
from grass.errors import ConfigError
from grass.finetune.options import Dtype, Template, as_tuple, at_least
from grass.reproduce.study import Pair, Search

TableName = Literal["arithmetic", "commonsense"]

SEARCH_SEED = 1000  # of the first order of the data in the search; results have 0, 1, ...


@dataclass(frozen=True)
class ReproduceOptions:
    """Options of a reproduction.

    Args:
        model: folder of a causal language model, or its name on the hub.
        trust_remote_code: run code that comes with the model, from its folder or the hub.
        data_dir: folder with the files of LLM-Adapters: math_10k.json or commonsense_170k.json, and a folder with
            test.json for each task. Test records that are among the training records are left out.
        table: "arithmetic" or "commonsense".
        tasks: some of the tasks of the table; by default all that have files.
        methods: methods to run; by default those of the paper's table.
        seeds: number of orders of the data that each method is run on.
        rates: learning rates that are tried first, ascending, each twice the one before. If the best is the smallest
            or the largest, the search goes on beyond it.
        search_seeds: number of orders of the data of the search.
        steps: number of optimizer steps of a run, the probe included.
        search_steps: number of steps of a run of the search; by default `steps`.
        batch_size: number of texts in a step.
        micro_batch_size: number of texts in a forward pass; by default `batch_size`.
        context: maximum length in tokens; longer training records are left out, also of those that are held out.
        template: how records are written: "alpaca", which LLM-Adapters uses, "plain", or "chat".
        dtype: dtype of the weights during training: auto (as saved), float32 or bfloat16.
        activation_checkpointing: recompute activations in the backward pass to save memory.
        validation: number of training records that are held out to choose learning rates; all of them are used.
        eval_limit: maximum number of test records of each task.
        eval_batch_size: number of test records in a forward pass.
        max_new_tokens: maximum length of a generated answer, in tokens.
        workers: number of processes that run at the same time.
        threads: number of threads of a process; by default the processors divided by `workers`.
        minutes: no run begins later.
        output: folder of the finished runs; with the same one, a stopped reproduction goes on.

    Raises:
        ConfigError: a value is out of range.
    """

    model: str = ""
    trust_remote_code: bool = False
    data_dir: str = ""
    table: TableName = "arithmetic"
    tasks: str | tuple[str, ...] = ""
    methods: str | tuple[str, ...] = ("full", "lora-r128", "dora-r128", "lisa", "static", "grass", "shuffled")
    seeds: int = 3
    rates: str | tuple[str, ...] = ("1e-5", "2e-5", "4e-5")
    search_seeds: int = 1
    steps: int = 1000
    search_steps: int | None = None
    batch_size: int = 16
    micro_batch_size: int | None = None
    context: int = 512
    template: Template = "alpaca"
    dtype: Dtype = "auto"
    activation_checkpointing: bool = False
    validation: int = 200
    eval_limit: int = 500
    eval_batch_size: int = 16
    max_new_tokens: int = 256
    workers: int = 1
    threads: int | None = None
    minutes: float = float("inf")
    output: str = "reproduction"

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("model", "data_dir"):
            if not getattr(self, name):
                raise ConfigError(f"--{name.replace('_', '-')} is required")
        optional = ("search_steps", "micro_batch_size", "threads")
        counts = ("seeds", "search_seeds", "steps", "batch_size", "context", "validation", "eval_limit")
        for name in (*counts, *optional, "eval_batch_size", "max_new_tokens", "workers"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        if self.seeds > SEARCH_SEED:
            raise ConfigError(f"seeds must be at most {SEARCH_SEED}, not {self.seeds}")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"batch_size ({self.batch_size}) must be a multiple of micro_batch_size ({self.micro_batch_size})"
            )
        if not self.minutes >= 0:
            raise ConfigError(f"minutes must not be negative, not {self.minutes}")
        try:
            rates = [float(rate) for rate in as_tuple(self.rates)]
        except ValueError:
            raise ConfigError(f"rates must be numbers, not {', '.join(as_tuple(self.rates))}") from None
        if not (rates and rates[0] > 0 and rates[-1] < float("inf")) or any(
            b != 2 * a for a, b in pairwise(rates)
        ):
            raise ConfigError(f"rates must be positive, each twice the one before, not {rates}")

    @property
    def base(self) -> str:
        """Name of the model in rows: the last part of its path."""
        path = Path(self.model)
        return path.resolve().name if path.exists() else path.name

    @property
    def search(self) -> Search:
        """Search for the learning rates."""
        rates = [float(rate) for rate in as_tuple(self.rates)]
        return Search(rates, range(SEARCH_SEED, SEARCH_SEED + self.search_seeds))

    @property
    def pairs(self) -> list[Pair]:
        """Pairs of the results."""
        return [(self.base, order) for order in range(self.seeds)]
