"""From records to token ids and labels: templates, masking of prompts, cutting, batches."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grass.errors import ConfigError, DataError
from grass.finetune.data import Chat, Instruction, PlainText, Record

IGNORED = -100  # label of tokens that the loss leaves out

_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n{given}### Response:\n"
)


def alpaca_prompt(instruction: str, given: str) -> str:
    """The prompt of Alpaca and LLM-Adapters."""
    return _ALPACA.format(
        paired=", paired with an input that provides further context" if given else "",
        instruction=instruction,
        given=f"### Input:\n{given}\n\n" if given else "",
    )


def plain_prompt(instruction: str, given: str) -> str:
    """The instruction, the input if there is one, and a line end."""
    return f"{instruction}\n{given}\n" if given else f"{instruction}\n"


TEMPLATES = {"alpaca": alpaca_prompt, "plain": plain_prompt}


class Example(NamedTuple):
    """Token ids of one text, and the ids to predict (`IGNORED` where nothing is learnt)."""

    input_ids: list[int]
    labels: list[int]


@dataclass
class Encoded:
    """Examples made from records, and what happened to them.

    Attributes:
        examples: what is left to learn from.
        num_cut: texts that were longer than the context.
        num_dropped: those of them of which nothing was left to learn.
    """

    examples: list[Example] = field(default_factory=list)
    num_cut: int = 0
    num_dropped: int = 0


class Encoder:
    """Turns records into examples for one tokenizer, template and context length.

    Args:
        tokenizer: of the model.
        template: name in `TEMPLATES`, for records with an instruction.
        context: longest example, in tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, context: int) -> None:
        if template not in TEMPLATES:
            raise ConfigError(f"template must be one of {', '.join(TEMPLATES)}, not {template!r}")
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no end-of-sequence token: answers could not end")
        self.tokenizer = tokenizer
        self.template = TEMPLATES[template]
        self.context = context
        self._eos: int = tokenizer.eos_token_id

    def encode(self, records: Iterable[Record], source: str) -> Encoded:
        """Encode records; texts longer than the context lose their end.

        Args:
            records: any mix of kinds.
            source: what to call them in an error.

        Raises:
            DataError: nothing is left to learn from.
        """
        result = Encoded()
        for record in records:
            input_ids, labels = self.encode_one(record)
            if len(input_ids) > self.context:
                result.num_cut += 1
                input_ids, labels = input_ids[: self.context], labels[: self.context]
            # The first label is never predicted: nothing stands before it.
            if all(label == IGNORED for label in labels[1:]):
                result.num_dropped += 1
                continue
            result.examples.append(Example(input_ids, labels))
        if not result.examples:
            raise DataError(
                f"{source}: no text leaves anything to learn within the context of {self.context} tokens"
            )
        return result

    def encode_one(self, record: Record) -> Example:
        """Encode a record at full length."""
        if isinstance(record, PlainText):
            ids = [*self._start(record.text), self._eos]
            return Example(ids, list(ids))
        if isinstance(record, Chat) and self.tokenizer.chat_template:
            return self._templated_chat(record)
        if isinstance(record, Chat):
            return self._plain_chat(record.messages, answer_next=False)
        prompt = self.prompt(record)
        response = [*self._continue(record.output), self._eos]
        return Example(prompt + response, [IGNORED] * len(prompt) + response)

    def prompt(self, record: Instruction | Chat) -> list[int]:
        """Token ids after which the model has to answer."""
        if isinstance(record, Instruction):
            return self._start(self.template(record.instruction, record.input))
        last = max(i for i, (role, _) in enumerate(record.messages) if role == "assistant")
        if self.tokenizer.chat_template:
            return self._apply_chat_template(record.messages[:last], answer_next=True)
        return self._plain_chat(record.messages[:last], answer_next=True).input_ids

    def _templated_chat(self, record: Chat) -> Example:
        """Labels on the assistant's turns, found as the difference between growing conversations."""
        ids = self._apply_chat_template(record.messages, answer_next=False)
        labels = [IGNORED] * len(ids)
        for i, (role, _) in enumerate(record.messages):
            if role == "assistant":
                before = self._apply_chat_template(record.messages[:i], answer_next=True)
                after = self._apply_chat_template(record.messages[: i + 1], answer_next=False)
                # Templates may drop parts of earlier turns: trust only what the whole text shares with both.
                start, end = _common_prefix(ids, before), _common_prefix(ids, after)
                labels[start:end] = ids[start:end]
        return Example(ids, labels)

    def _plain_chat(self, messages: Sequence[tuple[str, str]], *, answer_next: bool) -> Example:
        """For tokenizers without a chat template: a line for each turn, replies end with the end token."""
        ids: list[int] = []
        labels: list[int] = []
        turns = [*messages, ("assistant", None)] if answer_next else messages
        for role, content in turns:
            head = f"{role}:" if role == "assistant" else f"{role}: {content}\n"
            head_ids = self._continue(head) if ids else self._start(head)
            ids += head_ids
            labels += [IGNORED] * len(head_ids)
            if role == "assistant" and content is not None:
                reply = [*self._continue(f" {content}"), self._eos]
                ids += reply
                labels += reply
        return Example(ids, labels)

    def _apply_chat_template(self, messages: Sequence[tuple[str, str]], *, answer_next: bool) -> list[int]:
        if not messages:
            return []
        turns = [{"role": role, "content": content} for role, content in messages]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer_next)
        return self._continue(str(text))

    def _start(self, text: str) -> list[int]:
        """Ids with the special tokens that begin a text, without those that end it."""
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
    """Makes a batch: pads on the right to the longest example, and counts real tokens.

    Args:
        pad_token_id: what to pad with.

    Attributes:
        num_tokens: tokens of all batches made so far, without padding.
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
