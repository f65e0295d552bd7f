"""GRASS in a loop of accelerate, with gradient accumulation and updates inside backward."""

import torch
from accelerate import Accelerator
from tiny_model import make_model

import grass


def main() -> None:
    """Train for 24 steps of two micro-batches."""
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = make_model()
    config = grass.GrassConfig(
        active_layers=2, probe_steps=4, sample_interval=4, update_interval=8, fused_backward=True
    )
    optimizer = grass.GrassAdamW(model, lr=1e-3, config=config)
    ids = torch.randint(3, 16, (48 * 4, 16), generator=torch.Generator().manual_seed(0))
    batches = torch.utils.data.DataLoader(ids, batch_size=4)
    model, prepared, batches = accelerator.prepare(model, optimizer, batches)

    for ids in batches:
        with accelerator.accumulate(model):  # the optimizer learns from accelerate which backward ends a step
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            prepared.step()
            prepared.zero_grad()
    print(
        f"{optimizer.step_count} steps, loss {loss.item():.3f}, draws of each layer: {optimizer.draw_counts}"
    )
    optimizer.release()


if __name__ == "__main__":
    main()
