"""Records of training data, and what the keys of an object mean.

====================================================  ===========================================================
``{"messages": [{"role", "content"}, ...]}``          chat of OpenAI and TRL, with "tools" and "weight" of messages
``{"conversations": [{"from", "value"}, ...]}``       chat of ShareGPT
``{"prompt": [...], "completion": [...]}``            lists of messages, of TRL
task, input and reply, under the names in             Alpaca and LLM-Adapters (instruction, input, output), Dolly
`TASK_KEYS`, `INPUT_KEYS` and `REPLY_KEYS`            (instruction, context, response), GSM8K (question, answer), ...
``{"text"}``                                          `PlainText`
====================================================  ===========================================================

All but plain text become a `Conversation`. It may have an "answer", with which evaluation compares the generated text;
for evaluation, a record with an answer needs no reply. No key is ignored: those in `_REFUSED` change the meaning of a
record and are refused, all others that are not used are returned, to be told.
"""

import json
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from grass.errors import DataError

TASK_KEYS = ("instruction", "question", "query", "prompt")
INPUT_KEYS = ("input", "context")
REPLY_KEYS = ("output", "response", "completion")
ROLES = ("system", "user", "assistant", "tool")
FORMATS = '"messages", "conversations", "instruction" and "output", "prompt" and "completion", or "text"'


@dataclass(frozen=True)
class Message:
    """Message of a conversation.

    Attributes:
        role: one of `ROLES`.
        content: its text.
        learnt: False for a message of the assistant that is read and not learnt.
        input: second part of a task, which the alpaca template puts under a heading of its own.
        extra: further entries as JSON: "tool_calls" of the assistant, "name" and "tool_call_id" of a tool.
    """

    role: str
    content: str
    learnt: bool = True
    input: str = ""
    extra: str = "{}"

    def as_dict(self) -> dict[str, Any]:
        """Return the message as chat templates expect it."""
        if not self.input:
            return {"role": self.role, "content": self.content, **json.loads(self.extra)}
        whole = f"{self.content}\n\n{self.input}"
        return {"role": self.role, "content": whole, "instruction": self.content, "input": self.input}


@dataclass(frozen=True)
class Conversation:
    """Conversation of which the assistant's messages are learnt.

    Attributes:
        messages: its messages.
        answer: the answer that evaluation expects, if there is one.
        tools: descriptions of the tools that the assistant may call, as a JSON list.
        source, place: where it was read: the file, and file with line, for messages.
    """

    messages: tuple[Message, ...]
    answer: str | None = None
    tools: str = "[]"
    source: str = field(default="", compare=False)
    place: str = field(default="", compare=False)

    @property
    def question(self) -> tuple[Any, ...]:
        """All that the model is given: conversations with equal questions are the same task."""
        given = self.messages[:-1] if self.messages[-1].role == "assistant" else self.messages
        return (self.tools, *given) if given else ()

    @property
    def reply(self) -> str:
        """Text of the last message, if it is the assistant's."""
        return self.messages[-1].content if self.messages[-1].role == "assistant" else ""

    @property
    def has_target(self) -> bool:
        """True if there is something to learn."""
        return any(m.role == "assistant" and m.learnt for m in self.messages)


@dataclass(frozen=True)
class PlainText:
    """Text of which every token is a target; `source` and `place` are those of `Conversation`."""

    text: str
    answer: None = None
    source: str = field(default="", compare=False)
    place: str = field(default="", compare=False)

    @property
    def question(self) -> str:
        """The text."""
        return self.text

    @property
    def has_target(self) -> bool:
        """True: all of it is learnt."""
        return True


Record = Conversation | PlainText

_PREFERENCE = (
    "a record of a preference, of which rejected answers would be learnt; keep the right answers only, "
    'as "output" or "messages", or train with DPOTrainer or KTOTrainer of TRL'
)
_MEDIA = "`grass finetune` learns from text only; take these records out"
_FUNCTIONS = 'the old form of calls of tools; write them as "tools" and "tool_calls"'
_REASONING = 'would not be learnt; write it into "content", as the model is to generate it'
_LEARNT = 'not known; a message that must not be learnt has "weight": 0'

# Keys that change the meaning of a record, unless their value is empty: key -> reason and remedy.
_REFUSED = {
    **dict.fromkeys(("chosen", "rejected", "chosen_response", "rejected_response", "kto_tag"), _PREFERENCE),
    **dict.fromkeys(("negative", "negative_output", "negative_response"), _PREFERENCE),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
    **dict.fromkeys(("functions", "function_call"), _FUNCTIONS),
    **dict.fromkeys(("reasoning", "reasoning_content", "thinking"), _REASONING),
    **dict.fromkeys(("train", "training", "trainable", "loss", "loss_mask", "mask"), _LEARNT),
}

# Roles of ShareGPT and of the models whose conversations it collects.
_ROLE_OF = {role: role for role in ROLES} | {
    "developer": "system",
    **dict.fromkeys(("human", "Human"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "Assistant"), "assistant"),
    **dict.fromkeys(("function_response", "observation"), "tool"),
}


def rename_keys(item: Any, names: Mapping[str, str]) -> Any:
    """Return an object with keys renamed; anything else as it is.

    Args:
        item: the object.
        names: new name of a key.

    Raises:
        DataError: a new name is that of another key.
    """
    if not isinstance(item, dict) or item.keys().isdisjoint(names):
        return item
    for old, new in names.items():
        if old in item and new in item and new not in names:
            raise DataError(
                f"{json.dumps(old)} cannot be renamed: there is another {json.dumps(new)} (--columns)"
            )
    return {names.get(key, key): value for key, value in item.items()}


def parse_record(item: Any, *, evaluation: bool = False) -> tuple[Record, set[str]]:
    """Return the record that an object of a data file describes, and the names of its keys that are not used.

    Args:
        item: the object.
        evaluation: accept a record that has an answer and no reply.

    Raises:
        DataError: it is malformed, has nothing to learn, or would not be learnt as it is meant; without its place.
    """
    if not isinstance(item, dict):
        raise DataError(f"expected an object with {FORMATS}, found {_kind(item)}")
    _check_keys(item)
    if isinstance(item.get("label"), bool) or ("label" in item and item.get("completion") is not None):
        raise DataError(f'"label": {_PREFERENCE}')
    if item.get("weight") not in (None, 1):
        raise DataError(
            '"weight" of a whole record: all records count alike; take out what must not be learnt'
        )
    used: set[str]
    record: Record
    chat = next((key for key in ("messages", "conversations") if item.get(key) is not None), None)
    if chat is not None:
        messages, unused = _messages(item[chat], chat)
        record, used = _conversation(item, messages), {chat, "answer", "system", "tools"}
    elif isinstance(item.get("prompt"), list):
        prompt, unused = _messages(item["prompt"], "prompt")
        completion, more = (
            _messages(item["completion"], "completion") if item.get("completion") else ((), set())
        )
        unused |= more
        prompt = tuple(replace(m, learnt=m.role != "assistant") for m in prompt)
        record, used = (
            _conversation(item, prompt + completion),
            {"prompt", "completion", "answer", "system", "tools"},
        )
    elif (keys := _task_keys(item, evaluation=evaluation)) is not None:
        record, used, unused = *_task(item, *keys, evaluation=evaluation), set()
    elif item.get("text") is not None:
        record, used, unused = PlainText(_text(item, "text")), {"text"}, set()
    else:
        shown = ", ".join(json.dumps(key) for key in list(item)[:6]) or "no keys"
        raise DataError(f"expected {FORMATS}; found {shown}")
    if not record.has_target and not (evaluation and record.answer is not None):
        raise DataError("no message of the assistant to learn")
    if record.answer is not None and not record.question:
        raise DataError('an "answer" but no message before it: there is no question')
    return record, unused | {json.dumps(key) for key in _filled(item, used)}


def _is_filled(value: Any) -> bool:
    return value not in (None, "", [], {})


def _filled(item: dict[str, Any], used: Container[str]) -> list[str]:
    """Return the keys that are not used, except those without content."""
    return [key for key, value in item.items() if key not in used and _is_filled(value)]


def _check_keys(item: dict[str, Any]) -> None:
    for key in _filled(item, ()):
        if key in _REFUSED:
            raise DataError(f'"{key}": {_REFUSED[key]}')


def _text(item: dict[str, Any], key: str, *, may_be_empty: bool = False) -> str:
    value = item[key]
    if isinstance(value, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in value
    ):
        value = "".join(str(part.get("text") or "") for part in value)  # parts of a message, all of them text
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
    return str(value).rpartition("####")[2].strip() or None  # in GSM8K the result follows this sign


def _json(item: dict[str, Any], key: str, empty: Any) -> str:
    """Return a value as JSON; it may be JSON already, as in files whose columns have one type."""
    value = item.get(key) or empty
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise DataError(f'"{key}" is a string that is not valid JSON: {error.msg}') from None
    if not isinstance(value, list):
        raise DataError(f'"{key}" must be a list, not {_kind(value)}')
    return json.dumps(value)


def _task_keys(item: dict[str, Any], *, evaluation: bool) -> tuple[str, str, str] | None:
    """Return the names of task, input and reply, if the object has a task and a reply or answer."""
    task = next(
        (key for key in TASK_KEYS if item.get(key) is not None), None
    )  # tables fill columns with null
    reply = next((key for key in REPLY_KEYS if item.get(key) is not None), None)
    if reply is None and _is_filled(item.get("answer")) and (evaluation or task == "question"):
        reply = "answer"
    if task is None or reply is None:
        return None
    return task, next((key for key in INPUT_KEYS if _is_filled(item.get(key))), INPUT_KEYS[0]), reply


def _task(
    item: dict[str, Any], task: str, given: str, reply: str, *, evaluation: bool
) -> tuple[Conversation, set[str]]:
    answer = _answer(item)
    if reply == "answer" and task != "question":
        text = ""
    elif evaluation and answer is not None:
        text = str(item["answer"]) if reply == "answer" else _optional(item, reply)
    else:
        text = _text(item, reply)
    messages = [Message("system", system)] if (system := _optional(item, "system")) else []
    for question, earlier in _history(item.get("history")):
        messages += [Message("user", question), Message("assistant", earlier, learnt=False)]
    messages.append(Message("user", _text(item, task), input=_optional(item, given)))
    if text.strip():
        messages.append(Message("assistant", text))
    return Conversation(tuple(messages), answer), {task, given, reply, "answer", "system", "history"}


def _history(value: Any) -> Iterable[tuple[str, str]]:
    pairs = [] if value is None else value
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in pairs
    ):
        raise DataError('"history" must be a list of pairs of strings: earlier instructions and outputs')
    return pairs


def _conversation(item: dict[str, Any], messages: tuple[Message, ...]) -> Conversation:
    if _is_filled(item.get("history")):
        raise DataError('"history": write it into "messages"')
    if system := _optional(item, "system"):
        if any(message.role == "system" for message in messages):
            raise DataError('two system prompts: "system" and a message of the system')
        messages = (Message("system", system), *messages)
    return Conversation(messages, _answer(item), _json(item, "tools", []))


def _messages(value: Any, key: str) -> tuple[tuple[Message, ...], set[str]]:
    """Return the messages of a list, and the names of keys that are not used; tables hold it as JSON."""
    with suppress(json.JSONDecodeError):
        value = json.loads(value) if isinstance(value, str) else value
    if not isinstance(value, list) or not value:
        raise DataError(f'"{key}" must be a non-empty list')
    messages: list[Message] = []
    unused: set[str] = set()
    for index, item in enumerate(value, start=1):
        try:
            message, keys = _message(item)
        except DataError as error:
            raise DataError(f"message {index}: {error}") from None
        messages.append(message)
        unused |= keys
    return tuple(messages), unused


def _message(item: Any) -> tuple[Message, set[str]]:
    if not isinstance(item, dict):
        raise DataError(f'expected an object with "role" and "content", found {_kind(item)}')
    _check_keys(item)
    if item.get("from") == "function_call":  # of ShareGPT
        calls = _json({"calls": f"[{item.get('value')}]"}, "calls", [])
        functions = [{"type": "function", "function": function} for function in json.loads(calls)]
        item = {**item, "from": "gpt", "value": None, "tool_calls": functions}
    who, what = ("from", "value") if "from" in item and "value" in item else ("role", "content")
    calls = _json(item, "tool_calls", []) if _is_filled(item.get("tool_calls")) else ""
    if who not in item or (what not in item and not calls):
        raise DataError('expected an object with "role" and "content"')
    role = _ROLE_OF.get(item[who]) if isinstance(item[who], str) else None
    if role is None:
        raise DataError(f"role must be one of {', '.join(ROLES)}, not {json.dumps(item[who])}")
    if calls and role != "assistant":
        raise DataError(f'"tool_calls" of a message of the {role}: only the assistant calls tools')
    weight = item.get("weight")
    if weight not in (None, 0, 1):
        raise DataError(f'"weight" must be 0 or 1, not {json.dumps(weight)}')
    used = {who, what, "weight", "tool_calls"}
    extra = {"tool_calls": json.loads(calls)} if calls else {}
    if role == "tool":
        used |= {"name", "tool_call_id"}
        extra = {key: item[key] for key in ("name", "tool_call_id") if _is_filled(item.get(key))}
    unused = {f"{json.dumps(key)} of messages" for key in _filled(item, used)}
    if role != "assistant" and weight:
        unused.add('"weight" of messages that are not the assistant\'s')
    content = _optional(item, what) if calls else _text(item, what, may_be_empty=role != "assistant")
    return Message(role, content, weight != 0, extra=json.dumps(extra)), unused


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
