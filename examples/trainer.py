"""GRASS in Hugging Face Trainer. The three lines of GRASS are marked."""

import sys

from tiny_model import make_model, make_sums, make_tokenizer
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import grass
from grass.integrations.transformers import GrassCallback, trainer_optimizer


def main(folder: str = "runs/trainer") -> None:
    """Train for 30 steps, with logs for TensorBoard in ``folder``."""
    model, tokenizer = make_model(), make_tokenizer()
    texts = [question + answer + "<eos>" for question, answer in make_sums(64)]
    args = TrainingArguments(
        output_dir=folder,
        max_steps=30,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        weight_decay=0.01,
        logging_steps=5,
        report_to="tensorboard",
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    config = grass.GrassConfig(active_layers=2, probe_steps=5, sample_interval=5, update_interval=10)
    optimizer = trainer_optimizer(args=args, config=config)  # 1
    trainer = Trainer(
        model,
        args,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=[tokenizer(text, return_token_type_ids=False) for text in texts],
        optimizer_cls_and_kwargs=optimizer,  # 2
    )
    trainer.add_callback(GrassCallback(trainer))  # 3
    trainer.train()
    assert all(p.requires_grad for p in model.parameters())


if __name__ == "__main__":
    main(*sys.argv[1:])
