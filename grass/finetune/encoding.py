"""Encoding of records as token ids and labels: prompt templates, masking, truncation, batches."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grass.errors import ConfigError, DataError, library_errors
from grass.finetune.options import Template
from grass.finetune.records import Chat, Instruction, PlainText, Record

IGNORED = -100  # label of tokens that the loss ignores

_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n{given}### Response:\n"
)


def alpaca_prompt(instruction: str, context: str) -> str:
    """Return the prompt of Alpaca and LLM-Adapters."""
    return _ALPACA.format(
        paired=", paired with an input that provides further context" if context else "",
        instruction=instruction,
        given=f"### Input:\n{context}\n\n" if context else "",
    )


def plain_prompt(instruction: str, context: str) -> str:
    """Return the instruction and the input, if there is one, each followed by a newline."""
    return f"{instruction}\n{context}\n" if context else f"{instruction}\n"


TEMPLATES: dict[Template, Callable[[str, str], str]] = {"alpaca": alpaca_prompt, "plain": plain_prompt}


class Example(NamedTuple):
    """Token ids of a text, and its labels (`IGNORED` for tokens that are no target)."""

    input_ids: list[int]
    labels: list[int]


@dataclass
class Encoded:
    """Examples made from records.

    Attributes:
        examples: the examples that have at least one target.
        num_texts: number of all texts.
        num_cut: number of texts that were truncated to the context length.
        num_dropped: number of truncated texts without a target left, which are not in `examples`.
    """

    examples: list[Example] = field(default_factory=list)
    num_texts: int = 0
    num_cut: int = 0
    num_dropped: int = 0


class Encoder:
    """Encode records for a tokenizer, template and context length.

    Args:
        tokenizer: tokenizer of the model.
        template: prompt template of records with an instruction.
        context: maximum length of an example in tokens.

    Raises:
        ConfigError: the tokenizer has no end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template, context: int) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "the tokenizer has no end-of-sequence token, so generated answers would not end"
            )
        self.tokenizer = tokenizer
        self.template = TEMPLATES[template]
        self.context = context
        self._eos: int = tokenizer.eos_token_id

    def encode(self, records: Iterable[Record], source: str) -> Encoded:
        """Encode records, truncating those longer than the context.

        Args:
            records: records of any kind.
            source: name of the records in error messages.

        Raises:
            DataError: a record does not fit the chat template, or more than half of the texts have no target within
                the context.
        """
        result = Encoded()
        for record in records:
            result.num_texts += 1
            try:
                input_ids, labels = self.encode_one(record)
            except DataError as error:
                raise DataError(f"{source}: record {result.num_texts:,}: {error}") from error
            if len(input_ids) > self.context:
                result.num_cut += 1
                input_ids, labels = input_ids[: self.context], labels[: self.context]
            # The first token is never predicted, as no token precedes it.
            if all(label == IGNORED for label in labels[1:]):
                result.num_dropped += 1
                continue
            result.examples.append(Example(input_ids, labels))
        if not result.examples or 2 * result.num_dropped > result.num_texts:
            raise DataError(
                f"{source}: {result.num_dropped:,} of {result.num_texts:,} texts have no token to learn within the "
                f"context of {self.context} tokens: pass a larger --context, or leave those texts out"
            )
        return result

    def encode_one(self, record: Record) -> Example:
        """Encode a record without truncation."""
        if isinstance(record, PlainText):
            ids = [*self._start(record.text), self._eos]
            return Example(ids, list(ids))
        if isinstance(record, Chat) and self.tokenizer.chat_template:
            return self._templated_chat(record)
        if isinstance(record, Chat):
            return self._plain_chat(record.messages, record.unlearnt)
        prompt = self.prompt(record)
        response = [*self._continue(record.output), self._eos]
        return Example(prompt + response, [IGNORED] * len(prompt) + response)

    def prompt(self, record: Instruction | Chat) -> list[int]:
        """Return the token ids of the prompt to which the model generates an answer."""
        if isinstance(record, Instruction):
            return self._instruction_prompt(record)
        if self.tokenizer.chat_template:
            return self._apply_chat_template(record.question, answer_next=True)
        return self._plain_chat(record.question, answer_next=True).input_ids

    def _instruction_prompt(self, record: Instruction) -> list[int]:
        """Encode system, history and task; each earlier output ends with the EOS token, as in training."""
        before = f"{record.system}\n\n" if record.system else ""
        ids: list[int] = []
        for instruction, output in record.history:
            prompt = self.template(instruction, "")
            ids += self._continue(prompt) if ids else self._start(before + prompt)
            ids += [*self._continue(output), self._eos]
        prompt = self.template(record.instruction, record.input)
        return ids + self._continue(prompt) if ids else self._start(before + prompt)

    def _templated_chat(self, record: Chat) -> Example:
        """Encode a chat; targets are the tokens that each message of the assistant adds to the conversation."""
        ids = self._apply_chat_template(record.messages, answer_next=False)
        labels = [IGNORED] * len(ids)
        for i, (role, _) in enumerate(record.messages):
            if role == "assistant" and i not in record.unlearnt:
                before = self._before(record.messages[: i + 1])
                after = self._apply_chat_template(record.messages[: i + 1], answer_next=False)
                # Templates may drop parts of earlier messages: use only the prefix shared with the whole text.
                start, end = _common_prefix(ids, before), _common_prefix(ids, after)
                labels[start:end] = ids[start:end]
        return Example(ids, labels)

    def _before(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Return the token ids of a chat up to its last message, which is the assistant's."""
        if len(messages) > 1:
            return self._apply_chat_template(messages[:-1], answer_next=True)
        # A template may add a system prompt of its own, but does so only if there is a message.
        text, content = self._render(messages, answer_next=False), messages[0][1].strip()
        return self._continue(text[: text.rfind(content)] if content in text else text)

    def _plain_chat(
        self, messages: Sequence[tuple[str, str]], unlearnt: Sequence[int] = (), *, answer_next: bool = False
    ) -> Example:
        """Encode a chat without chat template: a line per message; those of the assistant end with the EOS token."""
        ids: list[int] = []
        labels: list[int] = []
        turns = [*messages, ("assistant", None)] if answer_next else messages
        for i, (role, content) in enumerate(turns):
            head = f"{role}:" if role == "assistant" else f"{role}: {content}\n"
            head_ids = self._continue(head) if ids else self._start(head)
            ids += head_ids
            labels += [IGNORED] * len(head_ids)
            if role == "assistant" and content is not None:
                reply = [*self._continue(f" {content}"), self._eos]
                ids += reply
                labels += [IGNORED] * len(reply) if i in unlearnt else reply
        return Example(ids, labels)

    def _apply_chat_template(self, messages: Sequence[tuple[str, str]], *, answer_next: bool) -> list[int]:
        return self._continue(self._render(messages, answer_next=answer_next))

    def _render(self, messages: Sequence[tuple[str, str]], *, answer_next: bool) -> str:
        turns = [{"role": role, "content": content} for role, content in messages]
        roles = ", ".join(role for role, _ in messages[:4]) + (", ..." if len(messages) > 4 else "")
        remedy = "change the turns of such records (put the system text into the first question, say), or the template"
        with library_errors(
            DataError, f"the model's chat template refuses a chat of the roles {roles}", remedy
        ):
            return str(
                self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer_next)
            )

    def _start(self, text: str) -> list[int]:
        """Return token ids with the special tokens at the beginning of a text, without those at its end."""
        ids = list(self.tokenizer(text)["input_ids"])
        return ids[:-1] if ids and ids[-1] == self._eos else ids

    def _continue(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


class Collator:
    """Collate examples into a batch, padded on the right to the longest example.

    Args:
        pad_token_id: id of the padding token.

    Attributes:
        num_tokens: number of tokens in all batches so far, without padding.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id
        self.num_tokens = 0

    def __call__(self, rows: Sequence[Example]) -> dict[str, Tensor]:
        """Return int64 [batch, longest] ``input_ids``, ``attention_mask`` and ``labels``."""
        longest = max(len(row.input_ids) for row in rows)
        padding = [longest - len(row.input_ids) for row in rows]
        self.num_tokens += len(rows) * longest - sum(padding)
        pairs = list(zip(rows, padding, strict=True))
        return {
            "input_ids": torch.tensor([row.input_ids + [self.pad_token_id] * n for row, n in pairs]),
            "attention_mask": torch.tensor([[1] * (longest - n) + [0] * n for n in padding]),
            "labels": torch.tensor([row.labels + [IGNORED] * n for row, n in pairs]),
        }
