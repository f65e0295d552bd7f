"""Encoding of records as token ids and labels: chat templates, labels of what is learnt, long texts, batches.

Conversations are rendered by the chat template of the tokenizer or by one of `TEMPLATES`, which are chat templates too:
saved with the model, they make every other program ask as the model was trained. TRL masks the user's turns only if a
template marks those of the assistant, and learns all of these; here labels are found by comparing token ids, for any
template and for single turns.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from grass.errors import ConfigError, DataError, first_line, library_errors
from grass.finetune.loss import IGNORED
from grass.finetune.options import Template
from grass.finetune.records import Conversation, Message, PlainText, Record

_TURNS = """\
{{%- for m in messages %}}
{{%- if m.role == 'system' %}}{{{{ m.content + '\n\n' }}}}
{{%- elif m.role == 'user' %}}{user}
{{%- elif m.role == 'assistant' and not m.tool_calls %}}{{{{ m.content + eos_token }}}}
{{%- else %}}{{{{ raise_exception('calls of tools need a chat template of the model') }}}}
{{%- endif %}}
{{%- endfor %}}"""

_ALPACA = """\
{{ 'Below is an instruction that describes a task' }}
{%- if m.input %}{{ ', paired with an input that provides further context' }}{% endif %}
{{- '. Write a response that appropriately completes the request.\n\n### Instruction:\n' }}
{{- (m.instruction or m.content) + '\n\n' }}
{%- if m.input %}{{ '### Input:\n' + m.input + '\n\n' }}{% endif %}
{{- '### Response:\n' }}"""

_PLAIN = """\
{{ (m.instruction or m.content) + '\n' }}{% if m.input %}{{ m.input + '\n' }}{% endif %}"""

# Chat templates for models that have none: the prompt of Alpaca and LLM-Adapters, and the task with a newline.
TEMPLATES = {"alpaca": _TURNS.format(user=_ALPACA), "plain": _TURNS.format(user=_PLAIN)}


def chat_template(tokenizer: PreTrainedTokenizerBase, template: Template) -> str:
    """Return the chat template that a choice stands for; with the BOS token if the tokenizer begins texts with it.

    Args:
        tokenizer: tokenizer of the model.
        template: ``"chat"`` for its own template, a name in `TEMPLATES`, or ``"auto"`` for its own if there is one,
            else alpaca.

    Raises:
        ConfigError: it is ``"chat"`` and the tokenizer has no chat template.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if template == "auto":
        template = "chat" if own else "alpaca"
    if template != "chat":
        begins = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        return ("{{- bos_token }}" if begins else "") + TEMPLATES[template]
    if not own:
        raise ConfigError(
            "template is 'chat', but the tokenizer has no chat template: pass --template alpaca or plain"
        )
    return str(own)


class Example(NamedTuple):
    """Token ids of a text, and its labels (`IGNORED` for tokens that are no target)."""

    input_ids: list[int]
    labels: list[int]


@dataclass
class Encoded:
    """Examples made from records.

    Attributes:
        examples: the examples, each with at least one target.
        num_texts: number of all texts.
        num_cut: number of conversations that were truncated to the context length.
        num_dropped: number of truncated conversations without a target left, which are not in `examples`.
        num_divided: number of plain texts that were divided into pieces of the context length.
        num_unrolled: number of conversations that became an example for each reply.
    """

    examples: list[Example] = field(default_factory=list)
    num_texts: int = 0
    num_cut: int = 0
    num_dropped: int = 0
    num_divided: int = 0
    num_unrolled: int = 0

    def dataset(self) -> Dataset:
        """Return the examples as columns ``input_ids`` and ``labels``."""
        return to_dataset(self.examples)


def to_dataset(examples: Sequence[Example]) -> Dataset:
    """Return examples as a data set with the columns ``input_ids`` and ``labels``."""
    return Dataset.from_dict(
        {"input_ids": [e.input_ids for e in examples], "labels": [e.labels for e in examples]}
    )


def pack(dataset: Dataset, context: int) -> Dataset:
    """Return a data set whose rows hold several texts, of together at most `context` tokens; no text is divided."""
    packed: Dataset = pack_dataset(dataset, seq_length=context, strategy="bfd")
    return packed


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Check that packed texts do not see each other, and that positions begin anew in each.

    Raises:
        ConfigError: they do, or the model takes no packed texts.
    """
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    embeddings: Any = model.get_input_embeddings()
    ids = (torch.arange(1, 12) * 7919 % len(embeddings.weight)).tolist()

    def last_logits(*texts: list[int]) -> torch.Tensor:
        row = {
            "input_ids": [token for text in texts for token in text],
            "seq_lengths": [len(t) for t in texts],
        }
        batch = {
            k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in collate([row]).items()
        }
        logits: torch.Tensor = model(**batch, use_cache=False).logits[0, -4:].float()
        return logits

    was_training = model.training
    model.eval()
    try:
        alone, packed, other = (last_logits(*first, ids[7:]) for first in ([], [ids[:4]], [ids[3:7]]))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the model takes no packed texts ({first_line(error)}): leave out --packing"
        ) from error
    finally:
        model.train(was_training)
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    if not torch.equal(packed, other) or (packed - alone).norm() > tolerance * alone.norm():
        raise ConfigError(
            "the model does not separate packed texts, which would see each other: leave out --packing"
        )


class Encoder:
    """Encode records for a tokenizer, template and context length.

    Args:
        tokenizer: tokenizer of the model.
        template: template of conversations.
        context: maximum length of an example in tokens.

    Raises:
        ConfigError: the tokenizer has no end-of-sequence token, or no chat template that `template` asks for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template, context: int) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "the tokenizer has no end-of-sequence token, so generated answers would not end"
            )
        self.tokenizer = tokenizer
        self.chat_template = chat_template(tokenizer, template)
        self.context = context

    def encode(
        self, records: Iterable[Record], source: str, advance: Callable[[], None] = lambda: None
    ) -> Encoded:
        """Encode records. Conversations longer than the context are truncated, plain texts divided into pieces.

        Args:
            records: records of any kind.
            source: name of the records, for error messages.
            advance: called after each record.

        Raises:
            DataError: a record does not fit the chat template, or more than half of the texts have no target within
                the context.
        """
        result = Encoded()
        for record in records:
            result.num_texts += 1
            try:
                whole = self.encode_one(record)
            except DataError as error:
                raise DataError(f"{record.place or source}: {error}") from error
            if isinstance(record, PlainText):
                pieces = [
                    Example(ids[i : i + self.context], labels[i : i + self.context])
                    for ids, labels in whole
                    for i in range(0, len(ids), self.context)
                ]
                result.num_divided += len(pieces) > 1
            else:
                pieces = [Example(ids[: self.context], labels[: self.context]) for ids, labels in whole]
                result.num_cut += any(len(ids) > self.context for ids, _ in whole)
                result.num_unrolled += len(whole) > 1
            # The first token is never predicted, as no token precedes it.
            kept = [piece for piece in pieces if any(label != IGNORED for label in piece.labels[1:])]
            result.examples += kept
            result.num_dropped += not kept
            advance()
        if not result.examples or 2 * result.num_dropped > result.num_texts:
            raise DataError(
                f"{source}: {result.num_dropped:,} of {result.num_texts:,} texts have no token to learn within the "
                f"context of {self.context} tokens: pass a larger --context, or leave those texts out"
            )
        return result

    def encode_one(self, record: Record) -> list[Example]:
        """Encode a record at its full length.

        Returns:
            One example; or one for each reply, if the template writes earlier turns otherwise than they were (without
            reasoning, say), so that the model sees what it will see.
        """
        if isinstance(record, PlainText):
            ids = list(self.tokenizer(record.text)["input_ids"])
            if ids[-1:] != [self.tokenizer.eos_token_id]:
                ids.append(int(self.tokenizer.eos_token_id))
            return [Example(ids, list(ids))]
        self._check_is_rendered(record)
        ends = [end for end, m in enumerate(record.messages, start=1) if m.role == "assistant" and m.learnt]
        text = self._render(record, len(record.messages))
        if all(text.startswith(self._render(record, end)) for end in ends):
            return [self._labelled(record, len(record.messages), ends)]
        return [self._labelled(record, end, [end]) for end in ends]

    def _labelled(self, record: Conversation, count: int, ends: Sequence[int]) -> Example:
        """Encode the first `count` messages; those before `ends` are learnt."""
        ids = self._tokens(self._render(record, count))
        labels = [IGNORED] * len(ids)
        for end in ends:
            after = ids if end == count else self._tokens(self._render(record, end))
            start, stop = (
                _common_prefix(ids, self._tokens(self._before(record, end))),
                _common_prefix(ids, after),
            )
            labels[start:stop] = ids[start:stop]
        return Example(ids, labels)

    def end_of_reply(self) -> int | None:
        """Return the token with which the template ends a message of the assistant, None if it is no special one."""
        reply = "Hello"
        try:
            text = self._render(Conversation((Message("user", "Hello"), Message("assistant", reply))), 2)
        except DataError:  # it wants another beginning
            return None
        ids = self._tokens(text[text.rfind(reply) + len(reply) :].lstrip()) if reply in text else []
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        return ids[0] if ids and ids[0] in special else None

    def prompt(self, record: Conversation) -> list[int]:
        """Return the token ids of the prompt to which the model generates the last message."""
        count = len(record.messages) - (record.messages[-1].role == "assistant")
        return self._tokens(self._render(record, count, answer_next=True))

    def _check_is_rendered(self, record: Conversation) -> None:
        """Check that the template shows to the model what a template may leave out: tools, their calls, some roles."""
        without_calls = tuple(
            replace(message, extra="{}") if message.role == "assistant" else message
            for message in record.messages
        )
        for name, stripped in (
            ("tools", replace(record, tools="[]")),
            ("calls of tools", replace(record, messages=without_calls)),
        ):
            count = len(record.messages)
            if stripped != record and self._render(stripped, count) == self._render(record, count):
                raise DataError(
                    f"the chat template leaves {name} out, so the model would not see them; take them out of the "
                    "record, or use a model whose template has them"
                )
        text = self._render(record, len(record.messages))
        for i, message in enumerate(record.messages):
            if message.role in ("system", "tool") and message.content.strip() not in text:
                other = (*record.messages[:i], replace(message, content="other"), *record.messages[i + 1 :])
                if self._render(replace(record, messages=other), len(other)) == text:
                    raise DataError(
                        f"the chat template leaves the {message.role}'s message out, so the model would not see it; "
                        "take it out of the record, write it into the question, or use a model whose template has it"
                    )

    def _before(self, record: Conversation, end: int) -> str:
        """Return the text before the message at `end` - 1, which is the assistant's."""
        if end > 1:
            return self._render(record, end - 1, answer_next=True)
        # A template may add a system prompt of its own, but does so only if there is a message.
        text, content = self._render(record, 1), record.messages[0].content.strip()
        return text[: text.rfind(content)] if content in text else text

    def _render(self, record: Conversation, count: int, *, answer_next: bool = False) -> str:
        """Return the text of the first `count` messages."""
        roles = ", ".join(m.role for m in record.messages[: min(count, 4)]) + (", ..." if count > 4 else "")
        remedy = "change the turns of such records (put the system text into the first question, say), or the template"
        with library_errors(DataError, f"the chat template refuses a chat of the roles {roles}", remedy):
            return str(
                self.tokenizer.apply_chat_template(
                    [message.as_dict() for message in record.messages[:count]],
                    tools=json.loads(record.tools) or None,
                    chat_template=self.chat_template,
                    tokenize=False,
                    add_generation_prompt=answer_next,
                )
            )

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


class Collator:
    """A collator that counts tokens.

    Args:
        collate: the collator, which gets rows with ``input_ids``.

    Attributes:
        num_tokens: number of tokens in all batches so far, without padding.
    """

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collate = collate
        self.num_tokens = 0

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """Return the batch of some rows."""
        self.num_tokens += sum(len(row["input_ids"]) for row in rows)
        return self.collate(rows)
