"""Study B: `grass reproduce` on SmolLM2-135M-Instruct, small enough for a CPU.

Weights are float32, since bfloat16 is ten times slower on processors without instructions for it (AVX512-BF16). A step
takes 3 to 5 s on a core, and a table two to three hours of two cores.
"""

from grass.config import GrassConfig
from grass.reproduce.options import ReproduceOptions, TableName

METHODS: dict[TableName, tuple[str, ...]] = {
    "arithmetic": ("full", "lora-r8", "uniform", "static", "static-top", "grass", "shuffled", "remeasured"),
    "commonsense": ("full", "uniform", "static", "grass", "shuffled", "remeasured"),
}
TASKS: dict[TableName, tuple[str, ...]] = {
    "arithmetic": ("MultiArith", "AddSub", "SingleEq", "SVAMP"),
    "commonsense": ("ARC-Easy", "openbookqa"),
}
STEPS, BATCH, CONTEXT, RECORDS, SEEDS = 80, 4, 96, 50, 3
STAGES = tuple(STEPS * quarter // 4 for quarter in range(4))
"""Steps of a run after which norms are measured."""
VALIDATION: dict[TableName, int] = {"arithmetic": 200, "commonsense": 50}
"""Of which those that are not longer than the context choose the rates: a quarter in arithmetic."""
NEW_TOKENS: dict[TableName, int] = {"arithmetic": 96, "commonsense": 16}
CONFIG = GrassConfig(active_layers=6, probe_steps=10, sample_interval=10, update_interval=10)
"""A fifth of 30 layers. Importance is refreshed before each draw: in short runs `grass` would else be `static`."""


def options_for(
    table: TableName, model: str, data_dir: str, output: str, workers: int, minutes: float
) -> ReproduceOptions:
    """Return the options of study B."""
    return ReproduceOptions(
        model=model,
        data_dir=data_dir,
        table=table,
        tasks=TASKS[table],
        methods=METHODS[table],
        seeds=SEEDS,
        rates=("1e-4", "2e-4", "4e-4"),
        steps=STEPS,
        search_steps=STEPS // 2,
        batch_size=BATCH,
        context=CONTEXT,
        template="plain",
        dtype="float32",
        validation=VALIDATION[table],
        eval_limit=RECORDS,
        eval_batch_size=RECORDS,
        max_new_tokens=NEW_TOKENS[table],
        workers=workers,
        threads=1,
        minutes=minutes,
        output=output,
    )
