"""GRASS in TRL's GRPOTrainer, which takes only ``optimizers=``. The three lines of GRASS are marked."""

import sys

from datasets import Dataset
from tiny_model import make_model, make_sums, make_tokenizer
from trl import GRPOConfig, GRPOTrainer

import grass
from grass.integrations.transformers import GrassCallback, make_optimizer


def count_ones(completions: list[str], **columns: object) -> list[float]:
    """Return a toy reward: the share of the digit 1 in each completion."""
    return [text.count("1") / max(1, len(text)) for text in completions]


def main(folder: str = "runs/trl_grpo") -> None:
    """Train for 12 steps, with logs for TensorBoard in ``folder``."""
    args = GRPOConfig(
        output_dir=folder,
        max_steps=12,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=8,
        learning_rate=1e-3,
        logging_steps=2,
        report_to="tensorboard",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
    )
    model = make_model()
    config = grass.GrassConfig(active_layers=2, probe_steps=4, sample_interval=2, update_interval=4)
    optimizer = make_optimizer(model, args=args, config=config)  # 1
    trainer = GRPOTrainer(
        model,
        reward_funcs=count_ones,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": question} for question, _ in make_sums(64)]),
        processing_class=make_tokenizer(),
        optimizers=(optimizer, None),  # 2
    )
    trainer.add_callback(GrassCallback(trainer))  # 3
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
