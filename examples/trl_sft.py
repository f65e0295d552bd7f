"""GRASS in TRL's SFTTrainer. The three lines of GRASS are marked."""

import sys

from datasets import Dataset
from tiny_model import make_model, make_sums, make_tokenizer
from trl import SFTConfig, SFTTrainer

import grass
from grass.integrations.transformers import GrassCallback, trainer_optimizer


def main(folder: str = "runs/trl_sft") -> None:
    """Train for 30 steps, with logs for TensorBoard in ``folder``."""
    args = SFTConfig(
        output_dir=folder,
        max_steps=30,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=5,
        report_to="tensorboard",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
    )
    sums = [{"prompt": question, "completion": answer} for question, answer in make_sums(64)]
    config = grass.GrassConfig(active_layers=2, probe_steps=5, sample_interval=5, update_interval=10)
    optimizer = trainer_optimizer(args=args, config=config)  # 1
    trainer = SFTTrainer(
        make_model(),
        args=args,
        train_dataset=Dataset.from_list(sums),
        processing_class=make_tokenizer(),
        optimizer_cls_and_kwargs=optimizer,  # 2
    )
    trainer.add_callback(GrassCallback(trainer))  # 3
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
