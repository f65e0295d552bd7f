"""`grass chat RUN_DIR`: try the result of a run."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grass.cli.values import MissingPackageError, UsageError, count
from grass.errors import RunFolderError
from grass.finetune.run_folder import RunFolder

if TYPE_CHECKING:
    from grass.finetune.chat import Chat

_DESCRIPTION = """\
Try the result of a run: what you write is put to the model as its training data was, and it answers.

An empty line, Ctrl-D or Ctrl-C ends the conversation, /clear begins a new one. Lines may come from a pipe, too.
"""


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("chat", help="try the result of a run", description=_DESCRIPTION)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder of a run, or of a model")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and end")
    parser.add_argument(
        "--max-new-tokens",
        type=count,
        metavar="N",
        help="longest answer, in tokens [256, at most half of the model's positions]",
    )
    parser.add_argument(
        "--temperature",
        type=_temperature,
        default=0.0,
        metavar="X",
        help="0 for the most likely token, else draw [0]",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the draws [0]")
    parser.add_argument(
        "--json", action="store_true", help="with --prompt: print prompt and answer as a JSON object"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; the exit code."""
    if arguments.json and arguments.prompt is None:
        raise UsageError("--json needs --prompt")
    path = Path(arguments.run_dir)
    if not (path / "config.json").is_file():  # told before torch is imported
        RunFolder.open(path)
    try:
        from grass.finetune.chat import Chat
        from grass.finetune.screen import quiet_libraries
    except ImportError as error:
        raise MissingPackageError(f"{error}; install with: pip install 'grass-optim[finetune]'") from error
    with quiet_libraries():
        chat = Chat(
            path,
            arguments.max_new_tokens,
            arguments.temperature,
            arguments.seed,
            trust_remote_code=arguments.trust_remote_code,
        )
        if chat.continues_text:
            print("the model continues texts; it was not trained on conversations", file=sys.stderr)
        if arguments.prompt is None:
            _converse(chat)
            return 0
        messages = [{"role": "user", "content": arguments.prompt}]
        if not chat.fits(messages):
            raise RunFolderError(
                "--prompt leaves no room for an answer: shorten it, or pass fewer --max-new-tokens"
            )
        answer = chat.answer(messages, stream=not arguments.json)
        if arguments.json:
            print(json.dumps({"prompt": arguments.prompt, "answer": answer}))
    return 0


def _converse(chat: Chat) -> None:
    """Answer lines of stdin until there are no more."""
    is_terminal = sys.stdin.isatty()
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not line.isascii() and any("\ud800" <= letter <= "\udfff" for letter in line):
            print("not UTF-8 text: nothing is answered", file=sys.stderr)
            continue
        if line == "/clear":
            messages = []
            continue
        if not line:
            return
        messages.append({"role": "user", "content": line})
        if not chat.fits(messages):
            print("the conversation leaves no room for an answer: it begins anew", file=sys.stderr)
            messages = messages[-1:]
        if not chat.fits(messages):
            print("too long: nothing is answered", file=sys.stderr)
            messages = []
            continue
        messages.append({"role": "assistant", "content": chat.answer(messages, stream=True)})


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be at least 0, not {text}")
    return value
