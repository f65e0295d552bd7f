"""Shapes: the parameters of a model's layers, and the time it computes."""

from typing import NamedTuple

import torch
from torch import Tensor

from grass.errors import ConfigError


class Shape(NamedTuple):
    """A Llama-like model.

    Args:
        name: for people.
        layers: how many blocks.
        hidden, intermediate, key_value: widths.
        vocab: rows of the embedding, and of the head.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    key_value: int
    vocab: int

    def layer(self) -> list[Tensor]:
        """Parameters of a block, bfloat16, without memory."""
        hidden, wide = self.hidden, self.intermediate
        square, narrow = (hidden, hidden), (self.key_value, hidden)
        mlp = [(wide, hidden), (wide, hidden), (hidden, wide)]
        return [_parameter(*shape) for shape in (square, narrow, narrow, square, *mlp, (hidden,), (hidden,))]

    def embedding(self) -> list[Tensor]:
        """Parameters of the embedding."""
        return [_parameter(self.vocab, self.hidden)]

    def head(self) -> list[Tensor]:
        """Parameters of the head."""
        return [_parameter(self.vocab, self.hidden)]

    def norm(self) -> list[Tensor]:
        """Parameters of the final norm."""
        return [_parameter(self.hidden)]


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tinyllama-1.1b", 22, 2048, 5632, 256, 32000),
        Shape("llama2-7b", 32, 4096, 11008, 4096, 32000),
        Shape("llama3-8b", 32, 4096, 14336, 1024, 128256),
        Shape("llama2-13b", 40, 5120, 13824, 5120, 32000),
    )
}


def shape_of(text: str) -> Shape:
    """A shape by name, or by numbers: layers x hidden x intermediate x vocab, as in ``32x4096x11008x32000``.

    Raises:
        ConfigError: with the names there are.
    """
    if text in SHAPES:
        return SHAPES[text]
    numbers = text.split("x")
    if len(numbers) == 4 and all(number.isdecimal() and int(number) > 0 for number in numbers):
        layers, hidden, intermediate, vocab = map(int, numbers)
        return Shape(text, layers, hidden, intermediate, hidden, vocab)
    raise ConfigError(
        f"{text!r} is no model: pass one of {', '.join(SHAPES)}, or its sizes as "
        "layers x hidden x intermediate x vocab, such as 32x4096x11008x32000"
    )


def numel(params: list[Tensor]) -> int:
    """Count the parameters."""
    return sum(p.numel() for p in params)


class Compute(NamedTuple):
    """Time of forward and backward: two operations a parameter and token for every product with weights.

    Args:
        tokens: in a step.
        flops: a second, as reached in training.
    """

    tokens: int
    flops: float

    def forward(self, params: list[Tensor]) -> float:
        """Seconds of a forward through these."""
        return 2 * numel(params) * self.tokens / self.flops

    def backward(self, params: list[Tensor], *, trains: bool, recomputes: bool) -> float:
        """Seconds of a backward: gradients of inputs, those of weights if they train, and a forward before it."""
        return (1 + trains + recomputes) * self.forward(params)


def _parameter(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")
