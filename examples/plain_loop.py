"""GRASS in a plain training loop."""

import torch
from tiny_model import make_model

import grass


def main() -> None:
    """Train for 30 steps."""
    model = make_model()
    config = grass.GrassConfig(active_layers=2, probe_steps=5, sample_interval=5, update_interval=10)
    optimizer = grass.GrassAdamW(model, lr=1e-3, config=config, max_grad_norm=1.0)

    generator = torch.Generator().manual_seed(0)
    for step in range(30):
        ids = torch.randint(3, 16, (4, 16), generator=generator)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        phase, layers = optimizer.phase, optimizer.active_layers
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {phase}, layers {layers}")
    print("draws of each layer:", optimizer.draw_counts)
    optimizer.release()


if __name__ == "__main__":
    main()
