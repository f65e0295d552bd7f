"""A model folder that holds a configuration alone."""

from pathlib import Path

import pytest

from tests.support.plan_model import SIZES


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig

    path = tmp_path_factory.mktemp("model")
    LlamaConfig(**SIZES).save_pretrained(path)
    return path
