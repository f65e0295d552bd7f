"""``python -m bench gpu --rehearse``: the stages at a tiny size, without a GPU.

Every command is the one that a GPU runs, with sizes that come after its own: what a machine without a GPU can show of a
run is that its processes start, that they understand their options, and that their results come back.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.gpu.stages import Stage, Task

INTERPRETED = ("smoke", "tests")
"""Stages whose kernels run in Triton's interpreter; the others take torch's path."""
SIZES = {
    "figures": ("--largest", "5000", "--seconds", "0.2"),
    "tests": (
        "-k",
        "kernels_are_what_runs or learning_rate_on_the_device or two_graphs or norms_are or overflow",
    ),
    "offload": ("--model", "4x256x512x1000", "--tokens", "64"),
    "training": ("--device", "cpu", "--batch", "2", "--seq", "8"),
    "kernels": ("--sizes", "20", "--seconds", "0.2"),
}
MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def rehearsal(stages: Sequence[Stage], folder: Path) -> list[Stage]:
    """Return the stages at a tiny size.

    Args:
        stages: those of a GPU.
        folder: folder for the model that is trained.
    """
    (folder / "config.json").write_text(json.dumps(MODEL))
    return [
        replace(
            stage,
            tasks=tuple(_tiny(stage, task, folder) for task in stage.tasks),
            environment={
                **stage.environment,
                "CUDA_VISIBLE_DEVICES": "",
                **({"TRITON_INTERPRET": "1"} if stage.name in INTERPRETED else {}),
            },
        )
        for stage in stages
    ]


def _tiny(stage: Stage, task: Task, folder: Path) -> Task:
    more = SIZES.get(stage.name, ())
    if stage.name == "training":
        more = (*more, "--model", str(folder))
    if "-n" in task.command:
        more = (*more, "-n", "0")
    return replace(task, command=(*task.command, *more))
