"""Evaluation on held-out records: loss, and generated answers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from grass.errors import ConfigError
from grass.finetune.encoding import Encoder, Example
from grass.finetune.loss import IGNORED, chunked_loss
from grass.finetune.records import Conversation
from grass.finetune.scoring import Rule


class Question(NamedTuple):
    """Name of the file, text of the user's last message, token ids of the whole prompt, and the expected answer."""

    source: str
    text: str
    prompt: list[int]
    expected: str


class Answer(NamedTuple):
    """Generated answer to a held-out record.

    Attributes:
        source: name of the file.
        question: text of the user's last message.
        prompt: the text that the model continued, special tokens included.
        expected: the expected answer.
        generated: the generated text.
        rule: name of the rule that compared them; empty if none did.
        correct: the result; None without a rule.
    """

    source: str
    question: str
    prompt: str
    expected: str
    generated: str
    rule: str
    correct: bool | None


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
    advance: Callable[[int], None] = lambda count: None,
) -> float:
    """Compute the mean cross-entropy over all target tokens, each with the same weight.

    Args:
        model: a causal language model.
        examples: held-out examples; tokens with the label `IGNORED` are no targets.
        batch_size: number of examples in a forward pass; changes the result only by rounding.
        pad_token_id: id of the padding token.
        chunked: use `chunked_loss`.
        advance: called after each batch with its number of examples.
    """
    collate = DataCollatorForLanguageModeling(pad_token_id)
    ordered = sorted(examples, key=lambda example: len(example.input_ids))  # for little padding
    total, count = 0.0, 0
    with _evaluating(model):
        for start in range(0, len(ordered), batch_size):
            rows = [example._asdict() for example in ordered[start : start + batch_size]]
            batch = {name: value.to(model.device) for name, value in collate(rows).items()}
            num_targets = int((batch["labels"][:, 1:] != IGNORED).sum())
            loss = chunked_loss(model, batch) if chunked else model(**batch, use_cache=False).loss
            total += float(loss) * num_targets
            count += num_targets
            advance(len(rows))
    return total / count


def make_questions(
    encoder: Encoder, records: Sequence[Conversation], positions: int | None, max_new_tokens: int
) -> tuple[list[Question], int]:
    """Encode the prompts of records, and cut the beginning of those that leave no room for the answer.

    Args:
        encoder: encodes the prompts.
        records: records with an answer, or a reply in its place.
        positions: number of positions of the model, None without a limit.
        max_new_tokens: maximum length of a generated answer in tokens.

    Returns:
        The questions, and the number of prompts that were cut.

    Raises:
        ConfigError: more than half of the prompts would have to be cut.
    """
    prompts = [encoder.prompt(record) for record in records]
    expected = [record.reply if record.answer is None else record.answer for record in records]
    num_cut = 0
    if positions is not None:
        room = positions - max_new_tokens
        num_cut = sum(len(prompt) > room for prompt in prompts)
        if 2 * num_cut > len(prompts):
            most = positions - max(map(len, prompts))
            remedy = f"--max-new-tokens of at most {most}" if most > 0 else "a model with more positions"
            raise ConfigError(
                f"{num_cut:,} of {len(prompts):,} questions are longer than the {max(0, room)} tokens that "
                f"{max_new_tokens} new ones leave of the model's {positions} positions: pass {remedy}"
            )
        prompts = [prompt[-room:] if len(prompt) > room else prompt for prompt in prompts]
    texts = [[m.as_dict()["content"] for m in record.messages if m.role == "user"][-1:] for record in records]
    sources = [record.source for record in records]
    columns = zip(sources, ("".join(text) for text in texts), prompts, expected, strict=True)
    return [Question(*column) for column in columns], num_cut


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    rules: Mapping[str, Rule],
    batch_size: int,
    max_new_tokens: int,
    pad_token_id: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """Generate an answer to each question by greedy decoding, and compare it with the expected one.

    Args:
        model: a causal language model.
        tokenizer: tokenizer of the model.
        questions: prompts and expected answers.
        rules: rule of each expected answer; answers without a rule are not scored.
        batch_size: number of prompts in a batch, padded on the left.
        max_new_tokens: maximum length of a generated answer in tokens.
        pad_token_id: id of the padding token.
        advance: called after each batch with its number of questions.
    """
    prompts = [question.prompt for question in questions]
    order = sorted(range(len(questions)), key=lambda i: len(prompts[i]))
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
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
                expected, prompt = questions[i].expected, str(tokenizer.decode(prompts[i]))
                rule = rules.get(expected)
                verdict = ("", None) if rule is None else (rule.name, rule.is_right(text, expected))
                answers[i] = Answer(
                    questions[i].source, questions[i].text, prompt, expected, text.strip(), *verdict
                )
            advance(len(chosen))
    return [answers[i] for i in range(len(questions))]
