"""Records of training data, and what the keys of an object mean.

=====================================================  ==========================================================
``{"instruction", "input"?, "output", ...}``           `Instruction`, the format of LLM-Adapters; with "system"
                                                       and "history" as in LLaMA-Factory
``{"messages": [{"role", "content", "weight"?}], ...}``  `Chat`, the format of OpenAI; "system" is its first message
``{"text"}``                                           `PlainText`
=====================================================  ==========================================================

Instructions and chats may have an "answer", with which evaluation compares the generated text; for evaluation, a record
with an answer needs no output. No key is ignored: those in `_REFUSED` change the meaning of a record and are refused,
all others that are not used are returned, to be told.
"""

import json
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from grass.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
FORMATS = '"instruction" and "output", or "messages", or "text"'

Turns = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Instruction:
    """Task and solution.

    Attributes:
        instruction, input: the task.
        output: the solution; empty in records that are for evaluation only.
        answer: the answer that evaluation expects, if there is one.
        system: text before the prompt.
        history: earlier (instruction, output) pairs, which are part of the prompt.
    """

    instruction: str
    output: str
    input: str = ""
    answer: str | None = None
    system: str = ""
    history: Turns = ()

    @property
    def question(self) -> Any:
        """All that the model is given: records with equal questions are the same task."""
        return self.system, self.history, self.instruction, self.input

    @property
    def has_target(self) -> bool:
        """True if there is something to learn."""
        return bool(self.output.strip())


@dataclass(frozen=True)
class Chat:
    """Conversation.

    Attributes:
        messages: (role, content) pairs.
        answer: the answer that evaluation expects, if there is one.
        unlearnt: indices of messages of the assistant that are not learnt (weight 0).
    """

    messages: Turns
    answer: str | None = None
    unlearnt: tuple[int, ...] = ()

    @property
    def question(self) -> Turns:
        """The messages before the answer: all but a last one of the assistant."""
        return self.messages[:-1] if self.messages[-1][0] == "assistant" else self.messages

    @property
    def has_target(self) -> bool:
        """True if there is something to learn."""
        return any(r == "assistant" and i not in self.unlearnt for i, (r, _) in enumerate(self.messages))


@dataclass(frozen=True)
class PlainText:
    """Text of which every token is a target."""

    text: str
    answer: None = None

    @property
    def question(self) -> str:
        """The text."""
        return self.text

    @property
    def has_target(self) -> bool:
        """True: all of it is learnt."""
        return True


Record = Instruction | Chat | PlainText

_PREFERENCE = (
    "a record of a preference, of which rejected answers would be learnt; keep the right answers only, "
    'as "output" or "messages", or train with DPOTrainer or KTOTrainer of TRL'
)
_MEDIA = "`grass finetune` learns from text only; take these records out"
_TOOLS = 'calls of tools are not learnt; write them as text in "content", or take these records out'
_REASONING = 'would not be learnt; write it into "content", as the model is to generate it'
_LEARNT = 'not known; a message that must not be learnt has "weight": 0'

# Keys that change the meaning of a record, unless their value is empty: key -> reason and remedy.
_REFUSED = {
    **dict.fromkeys(("chosen", "rejected", "chosen_response", "rejected_response", "kto_tag"), _PREFERENCE),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), _TOOLS),
    **dict.fromkeys(("reasoning", "reasoning_content", "thinking"), _REASONING),
    **dict.fromkeys(("train", "training", "trainable", "loss", "loss_mask", "mask"), _LEARNT),
}


def parse_record(item: Any, *, evaluation: bool = False) -> tuple[Record, set[str]]:
    """Return the record that an object of a data file describes, and the names of its keys that are not used.

    Args:
        item: the object.
        evaluation: accept a record that has an answer and no output.

    Raises:
        DataError: it is malformed, has nothing to learn, or would not be learnt as it is meant; without its place.
    """
    if not isinstance(item, dict):
        raise DataError(f"expected an object with {FORMATS}, found {_kind(item)}")
    _check_keys(item)
    if isinstance(item.get("label"), bool):
        raise DataError(f'"label": {_PREFERENCE}')
    answer = _answer(item)
    record: Record
    unused: set[str] = set()
    if "messages" in item:
        record, unused = _chat(item, answer)
        used = {"messages", "answer", "system"}
    elif "instruction" in item and ("output" in item or (evaluation and answer is not None)):
        record = _instruction(item, answer, evaluation=evaluation)
        used = {"instruction", "input", "output", "answer", "system", "history"}
    elif "text" in item:
        record = PlainText(_text(item, "text"))
        used = {"text"}
    else:
        keys = ", ".join(json.dumps(key) for key in list(item)[:6]) or "no keys"
        raise DataError(f"expected {FORMATS}; found {keys}")
    if not record.has_target and not (evaluation and answer is not None):
        raise DataError("no message of the assistant to learn")
    if answer is not None and not record.question:
        raise DataError('an "answer" but no message before it: there is no question')
    return record, unused | {json.dumps(key) for key in _filled(item, used)}


def _filled(item: dict[str, Any], used: Container[str]) -> list[str]:
    """Return the keys that are not used, except those without content."""
    return [key for key, value in item.items() if key not in used and value not in (None, "", [], {})]


def _check_keys(item: dict[str, Any]) -> None:
    for key in _filled(item, ()):
        if key in _REFUSED:
            raise DataError(f'"{key}": {_REFUSED[key]}')


def _text(item: dict[str, Any], key: str, *, may_be_empty: bool = False) -> str:
    value = item[key]
    if not isinstance(value, str):
        remedy = "; join its texts to one string, if it has no other parts" if isinstance(value, list) else ""
        raise DataError(f'"{key}" must be a string, not {_kind(value)}{remedy}')
    if not value.strip() and not may_be_empty:
        raise DataError(f'"{key}" is empty')
    return value


def _optional(item: dict[str, Any], key: str) -> str:
    """Return a text that may be missing, empty or null."""
    return _text(item, key, may_be_empty=True) if item.get(key) is not None else ""


def _answer(item: dict[str, Any]) -> str | None:
    value = item.get("answer")
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(f'"answer" must be a string or a number, not {_kind(value)}')
    return str(value)


def _instruction(item: dict[str, Any], answer: str | None, *, evaluation: bool) -> Instruction:
    optional = evaluation and answer is not None
    return Instruction(
        _text(item, "instruction"),
        _optional(item, "output") if optional else _text(item, "output"),
        _optional(item, "input"),
        answer,
        _optional(item, "system"),
        _history(item.get("history")),
    )


def _history(value: Any) -> Turns:
    pairs = [] if value is None else value
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in pairs
    ):
        raise DataError('"history" must be a list of pairs of strings: earlier instructions and outputs')
    return tuple((question, reply) for question, reply in pairs)


def _chat(item: dict[str, Any], answer: str | None) -> tuple[Chat, set[str]]:
    value = item["messages"]
    if not isinstance(value, list) or not value:
        raise DataError('"messages" must be a non-empty list')
    if item.get("history"):
        raise DataError('"history": write it into "messages"')
    turns: list[tuple[str, str]] = []
    unlearnt: list[int] = []
    unused: set[str] = set()
    if system := _optional(item, "system"):
        turns.append(("system", system))
    for index, message in enumerate(value, start=1):
        try:
            role, content, learnt = _message(message)
        except DataError as error:
            raise DataError(f"message {index}: {error}") from None
        if role == "assistant" and not learnt:
            unlearnt.append(len(turns))
        if role != "assistant" and message.get("weight"):
            unused.add('"weight" of messages that are not the assistant\'s')
        if role == "system" and system:
            raise DataError('two system prompts: "system" and a message of the system')
        turns.append((role, content))
        unused |= {
            f"{json.dumps(key)} of messages" for key in _filled(message, ("role", "content", "weight"))
        }
    return Chat(tuple(turns), answer, tuple(unlearnt)), unused


def _message(message: Any) -> tuple[str, str, bool]:
    """Return role and content, and False for a message of weight 0."""
    if not isinstance(message, dict):
        raise DataError(f'expected an object with "role" and "content", found {_kind(message)}')
    _check_keys(message)
    if "role" not in message or "content" not in message:
        raise DataError('expected an object with "role" and "content"')
    role = message["role"]
    if role not in ROLES:
        raise DataError(f"role must be one of {', '.join(ROLES)}, not {json.dumps(role)}")
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise DataError(f'"weight" must be 0 or 1, not {json.dumps(weight)}')
    return role, _text(message, "content", may_be_empty=role != "assistant"), weight != 0


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
