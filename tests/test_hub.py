"""Names of models on the hub.

Would catch: half a minute of silent retries where the hub cannot be reached; a question to the network for a model
that is already on the disk, or where the user has asked to stay offline; a refusal where the hub has answered.
"""

import huggingface_hub
import pytest
import transformers

from grass.cli import main
from grass.errors import ModelError
from grass.finetune.model import load_model
from grass.hub import check_hub


class Refused(huggingface_hub.errors.HfHubHTTPError):
    """An answer of the hub: the model is gated, say."""

    def __init__(self):
        Exception.__init__(self, "401")


@pytest.fixture
def asked(monkeypatch):
    """Names that the hub was asked for; the connection fails."""
    names = []

    def get_hf_file_metadata(url, timeout):
        names.append(url)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda _name, _file, **_: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", get_hf_file_metadata)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", pytest.fail)
    return names


def test_a_hub_out_of_reach_is_told_after_one_question(asked):
    with pytest.raises(
        ModelError, match=r"'some/model': no such folder, and the hub cannot be reached: Name or"
    ):
        load_model("some/model")
    assert len(asked) == 1
    assert asked[0].endswith("some/model/resolve/main/config.json")


@pytest.mark.parametrize("command", [["layers", "some/model"], ["plan", "--model", "some/model"]])
def test_every_command_asks_first(asked, command, capsys):
    assert main(command) == 1
    assert "the hub cannot be reached" in capsys.readouterr().err
    assert len(asked) == 1


def test_what_is_on_the_disk_or_offline_is_not_asked_for(asked, monkeypatch, tmp_path):
    check_hub(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "try_to_load_from_cache", lambda _name, _file, **_: "config.json")
        check_hub("some/model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    check_hub("some/model")
    assert asked == []


def test_an_answer_of_the_hub_is_left_to_the_loader(asked, monkeypatch):
    def get_hf_file_metadata(url, timeout):
        raise Refused

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", get_hf_file_metadata)
    check_hub("some/model")
