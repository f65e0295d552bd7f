"""Conversations with a fine-tuned model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from grass.errors import DataError, RunFolderError, library_errors
from grass.finetune.model import load_model, positions_of
from grass.finetune.preparation import to_device
from grass.finetune.run_folder import RunFolder

Messages = Sequence[dict[str, str]]


class Chat:
    """A model that answers as it was trained: by the chat template saved with it, or by continuing a text.

    Args:
        path: folder of a run, or of a model.
        trust_remote_code: run code that comes with the model; that of a run is run if it was for the run.
        max_new_tokens: maximum length of an answer in tokens; by default 256, at most half of the model's positions.
        temperature: 0 for the most likely token; else tokens are drawn.
        seed: seed of the draws.

    Raises:
        RunFolderError: there is no model in the folder.
    """

    def __init__(
        self,
        path: Path,
        max_new_tokens: int | None,
        temperature: float,
        seed: int = 0,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        continues_text = False
        if not (path / "config.json").is_file():
            folder = RunFolder.open(path)
            if not folder.model.is_dir():
                raise RunFolderError(
                    f"{path}: the run has no model yet; continue it with: grass finetune --resume {path}"
                )
            path, continues_text = folder.model, bool(folder.record.get("continues_text"))
            trust_remote_code |= bool(folder.record.get("options", {}).get("trust_remote_code"))
        self.model, self.tokenizer = load_model(str(path), trust_remote_code=trust_remote_code)
        self.continues_text = continues_text or not self.tokenizer.chat_template
        to_device(self.model)
        self.model.eval()
        positions = positions_of(self.model) or 2**31
        max_new_tokens = max_new_tokens or min(256, positions // 2)
        self._room = positions - max_new_tokens
        drawn = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        self._settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            eos_token_id=self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id,
            bos_token_id=self.tokenizer.bos_token_id,
            **drawn,
        )
        torch.manual_seed(seed)

    def fits(self, messages: Messages) -> bool:
        """Return False if the messages leave no room for an answer in the model's positions."""
        return len(self._tokens(messages)) <= self._room

    def answer(self, messages: Messages, *, stream: bool = False) -> str:
        """Return the model's answer.

        Args:
            messages: with the keys ``"role"`` and ``"content"``; a model that continues texts
                sees the last one only.
            stream: print the answer while it is generated.
        """
        ids = self._tokens(messages)
        inputs = torch.tensor([ids], device=self.model.device)
        streamer: Any = (
            TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
        )
        generate: Any = self.model.generate  # mypy sees nn.Module.__getattr__
        tokens = generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=self._settings,
            streamer=streamer,
        )
        return str(self.tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True)).strip()

    def _tokens(self, messages: Messages) -> list[int]:
        with library_errors(DataError, "the text cannot be put to the model", "write it otherwise"):
            if self.continues_text:
                return list(self.tokenizer(messages[-1]["content"])["input_ids"])
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
            return list(self.tokenizer(str(text), add_special_tokens=False)["input_ids"])
