"""GRASS in TRL's DPOTrainer, which takes only ``optimizers=``. The three lines of GRASS are marked."""

import sys

from datasets import Dataset
from tiny_model import make_model, make_sums, make_tokenizer
from trl import DPOConfig, DPOTrainer

import grass
from grass.integrations.transformers import GrassCallback, make_optimizer


def main(folder: str = "runs/trl_dpo") -> None:
    """Train for 20 steps to prefer right sums, with logs for TensorBoard in ``folder``."""
    args = DPOConfig(
        output_dir=folder,
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=5,
        report_to="tensorboard",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
    )
    pairs = [{"prompt": q, "chosen": a, "rejected": str(int(a) + 1)} for q, a in make_sums(64)]
    model = make_model()
    config = grass.GrassConfig(active_layers=2, probe_steps=5, sample_interval=5, update_interval=10)
    optimizer = make_optimizer(model, args=args, config=config)  # 1
    trainer = DPOTrainer(
        model,
        ref_model=make_model(),
        args=args,
        train_dataset=Dataset.from_list(pairs),
        processing_class=make_tokenizer(),
        optimizers=(optimizer, None),  # 2
    )
    trainer.add_callback(GrassCallback(trainer))  # 3
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
