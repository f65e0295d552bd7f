"""Evaluation on held-out records: loss, and generated answers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel

from grass.finetune.encoding import IGNORED, Collator, Encoder, Example
from grass.finetune.loss import chunked_loss
from grass.finetune.records import Chat, Instruction
from grass.finetune.scoring import Rule


class Answer(NamedTuple):
    """Generated answer to a held-out record.

    Attributes:
        prompt: the text that the model continued, special tokens included.
        expected: the expected answer.
        generated: the generated text.
        rule: name of the rule that compared them.
        correct: the result.
    """

    prompt: str
    expected: str
    generated: str
    rule: str
    correct: bool


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def heldout_loss(
    model: PreTrainedModel,
    examples: Sequence[Example],
    batch_size: int,
    pad_token_id: int,
    chunked: bool = False,
) -> float:
    """Compute the mean cross-entropy over all target tokens, each with the same weight.

    Args:
        model: a causal language model.
        examples: held-out examples; tokens with the label `IGNORED` are no targets.
        batch_size: number of examples in a forward pass; changes the result only by rounding.
        pad_token_id: id of the padding token.
        chunked: use `chunked_loss`.
    """
    collate = Collator(pad_token_id)
    ordered = sorted(examples, key=lambda example: len(example.input_ids))  # for little padding
    total, count = 0.0, 0
    with _evaluating(model):
        for start in range(0, len(ordered), batch_size):
            batch = {k: v.to(model.device) for k, v in collate(ordered[start : start + batch_size]).items()}
            num_targets = int((batch["labels"][:, 1:] != IGNORED).sum())
            loss = chunked_loss(model, batch) if chunked else model(**batch, use_cache=False).loss
            total += float(loss) * num_targets
            count += num_targets
    return total / count


def answer_records(
    model: PreTrainedModel,
    encoder: Encoder,
    records: Sequence[Instruction | Chat],
    rules: Mapping[str, Rule],
    batch_size: int,
    max_new_tokens: int,
    pad_token_id: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """Generate an answer to each record by greedy decoding, and compare it with the expected one.

    Args:
        model: a causal language model.
        encoder: encodes the prompts.
        records: records with an answer.
        rules: the rule of each expected answer.
        batch_size: number of prompts in a batch, padded on the left.
        max_new_tokens: maximum length of a generated answer in tokens.
        pad_token_id: id of the padding token.
        advance: called after each batch with its number of records.
    """
    tokenizer = encoder.tokenizer
    room = max(1, encoder.context - max_new_tokens)
    prompts = [encoder.prompt(record)[-room:] for record in records]
    expected = [str(record.answer) for record in records]
    order = sorted(range(len(records)), key=lambda i: len(prompts[i]))
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=min(max_new_tokens, encoder.context - 1),
        pad_token_id=pad_token_id,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    answers: dict[int, Answer] = {}
    with _evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = max(len(prompts[i]) for i in chosen)
            padding = [width - len(prompts[i]) for i in chosen]
            pairs = list(zip(chosen, padding, strict=True))
            ids = torch.tensor([[pad_token_id] * n + prompts[i] for i, n in pairs], device=model.device)
            mask = torch.tensor([[0] * n + [1] * (width - n) for n in padding], device=model.device)
            generate: Any = model.generate  # mypy sees nn.Module.__getattr__
            generated = generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            texts = tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                rule, prompt = rules[expected[i]], str(tokenizer.decode(prompts[i]))
                correct = rule.is_right(text, expected[i])
                answers[i] = Answer(prompt, expected[i], text.strip(), rule.name, correct)
            advance(len(chosen))
    return [answers[i] for i in range(len(records))]
