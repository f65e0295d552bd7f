"""GRASS with peft's LoRA in Hugging Face Trainer: the adapters of two layers train at a time."""

import sys

import peft
from tiny_model import make_model, make_sums, make_tokenizer
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import grass
from grass.integrations.transformers import GrassCallback, trainer_optimizer


def main(folder: str = "runs/lora") -> None:
    """Train for 30 steps, with logs for TensorBoard in ``folder``."""
    tokenizer = make_tokenizer()
    texts = [question + answer + "<eos>" for question, answer in make_sums(64)]
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model(), lora)
    adapters = {name for name, p in model.named_parameters() if p.requires_grad}
    args = TrainingArguments(
        output_dir=folder,
        max_steps=30,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=5,
        report_to="tensorboard",
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    config = grass.GrassConfig(active_layers=2, probe_steps=5, sample_interval=5, update_interval=10)
    optimizer = trainer_optimizer(args=args, config=config)
    trainer = Trainer(
        model,
        args,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=[tokenizer(text, return_token_type_ids=False) for text in texts],
        optimizer_cls_and_kwargs=optimizer,
    )
    trainer.add_callback(GrassCallback(trainer))
    trainer.train()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == adapters
    model.save_pretrained(f"{folder}/adapters")


if __name__ == "__main__":
    main(*sys.argv[1:])
