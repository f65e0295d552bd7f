"""GRASS in Lightning. The two lines of GRASS are marked."""

import sys

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from tiny_model import make_model

import grass
from grass.integrations.lightning import GrassCallback


class Module(lightning.LightningModule):
    """A language model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()

    def training_step(self, ids: torch.Tensor, index: int) -> torch.Tensor:
        """Return the loss of a batch of token ids."""
        return self.model(input_ids=ids, labels=ids).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        config = grass.GrassConfig(
            active_layers=2, probe_steps=5, sample_interval=5, update_interval=10, fused_backward=True
        )
        return grass.GrassAdamW(self.model, lr=1e-3, config=config)  # 1


def main(folder: str = "runs/lightning") -> None:
    """Train for 30 steps of two micro-batches, with logs in ``folder``."""
    ids = torch.randint(3, 16, (240, 16), generator=torch.Generator().manual_seed(0))
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=30,
        accumulate_grad_batches=2,
        log_every_n_steps=5,
        logger=CSVLogger(folder),
        callbacks=[GrassCallback()],  # 2
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(ids, batch_size=4))


if __name__ == "__main__":
    main(*sys.argv[1:])
