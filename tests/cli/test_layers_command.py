"""Failures these tests catch: sizes that do not add up, a preset that is not known here, the encoder of an
encoder-decoder left out, weights loaded or needed, a traceback where a line is due, a wrong exit code.
"""

import json
import sys
from pathlib import Path

import pytest

from grass.cli import main
from grass.cli.layers import human

transformers = pytest.importorskip("transformers", reason="the command builds models of transformers")

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
LLAMA_BLOCK = 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32


def grass(*arguments):
    return main(arguments)


@pytest.fixture
def folder(tmp_path):
    def save(config):
        config.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return save


def test_table(folder, capsys):
    path = folder(transformers.LlamaConfig(**TINY, tie_word_embeddings=True))
    assert grass("layers", path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{path} (LlamaForCausalLM)",
        "",
        "layer  path                parameters   share",
        "    0  model.layers.0          8.77 K   30.9%",
        "    1  model.layers.1          8.77 K   30.9%",
        "    2  model.layers.2          8.77 K   30.9%",
        "       3 layers                26.3 K   92.7%",
        "",
        "       model.embed_tokens      2.05 K    7.2%  tied with lm_head",
        "       model.norm                  32    0.1%",
        "       outside                 2.08 K    7.3%",
        "",
        "       total                   28.4 K  100.0%",
    ]


def test_json(folder, capsys):
    path = folder(transformers.LlamaConfig(**TINY))
    assert grass("layers", path, "--json") == 0
    described = json.loads(capsys.readouterr().out)
    assert [row["path"] for row in described["layers"]] == [f"model.layers.{i}" for i in range(3)]
    assert {row["num_params"] for row in described["layers"]} == {LLAMA_BLOCK}
    assert [(row["path"], row["num_params"]) for row in described["outside"]] == [
        ("model.embed_tokens", 64 * 32),
        ("model.norm", 32),
        ("lm_head", 64 * 32),
    ]
    assert described["layers_num_params"] + described["outside_num_params"] == described["num_params"]
    assert sum(row["share"] for row in described["layers"] + described["outside"]) == pytest.approx(1)


def test_a_preset_needs_no_network_and_a_folder_of_its_name_comes_first(
    folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda name: pytest.fail("asked the hub"))
    assert grass("layers", "llama2-7b", "--json") == 0
    described = json.loads(capsys.readouterr().out)
    assert described["num_params"] == 6_738_415_616
    assert len(described["layers"]) == 32
    monkeypatch.undo()
    Path(folder(transformers.LlamaConfig(**TINY))).rename(tmp_path / "llama2-7b")
    monkeypatch.chdir(tmp_path)
    assert grass("layers", "llama2-7b", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 3


def test_encoder_decoder_shows_both_stacks(folder, capsys):
    path = folder(transformers.BartConfig(vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=1))
    assert grass("layers", path) == 0
    out = capsys.readouterr().out
    assert all(
        f"model.{name}" in out for name in ("encoder.layers.0", "encoder.layers.1", "decoder.layers.0")
    )


def test_tower_is_one_line(folder, capsys):
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4}
    path = folder(
        transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**TINY), vision_config=transformers.CLIPVisionConfig(**tower)
        )
    )
    assert grass("layers", path, "--json") == 0
    described = json.loads(capsys.readouterr().out)
    assert len(described["layers"]) == 3
    assert [row["path"] for row in described["outside"]][:2] == [
        "model.vision_tower",
        "model.multi_modal_projector",
    ]


def test_patterns(folder, capsys):
    path = folder(transformers.BartConfig(vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2))
    assert grass("layers", path, "--json", "--pattern", "model.decoder.layers.*") == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 2
    for both in (
        ("--pattern", "model.decoder.layers.*", "--pattern", "model.encoder.layers.0"),
        ("--pattern", "model.decoder.layers.*,model.encoder.layers.0"),
    ):
        assert grass("layers", path, "--json", *both) == 0
        assert json.loads(capsys.readouterr().out)["layers"][2]["path"] == "model.encoder.layers.0"
    assert grass("layers", path, "--pattern", "model.none.*") == 2
    error = capsys.readouterr().err
    assert "'model.none.*' matches no module" in error
    assert error.count("\n") == 1


def test_doubt_lists_the_candidates(folder, capsys):
    path = folder(transformers.XLMConfig(n_words=64, emb_dim=32, n_layers=2, n_heads=4))
    assert grass("layers", path) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "transformer.ffns.*" in captured.err
    assert "--pattern" in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("content", [None, "{", "{}", '{"model_type": "no-such-type"}'])
def test_folder_without_a_usable_configuration(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert grass("layers", str(tmp_path)) == (2 if content is None else 1)
    error = capsys.readouterr().err
    assert error.startswith("grass layers: ")
    assert error.count("\n") == 1
    assert str(tmp_path) in error


@pytest.mark.parametrize(("name", "code"), [("./no/such/model", 2), ("no-such-model", 1)])
def test_name_that_leads_nowhere(capfd, monkeypatch, name, code):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert grass("layers", name) == code
    error = capfd.readouterr().err
    assert name in error
    assert error.count("\n") == 1


def test_configuration_that_builds_nothing(folder, capsys):
    path = folder(transformers.LlamaConfig(**TINY))
    file = Path(path, "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_act": "no-such-activation"}))
    assert grass("layers", path) == 1
    error = capsys.readouterr().err
    assert "cannot be built" in error
    assert error.count("\n") == 1


def test_without_transformers_the_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert grass("layers", "anything") == 1
    assert "pip install grass-optim[transformers]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (999, "999"), (1000, "1.00 K"), (12_345, "12.3 K"), (999_499, "999 K"), (999_500, "1.00 M"),
        (202_383_360, "202 M"), (6_738_415_616, "6.74 B"), (9_996_000_000, "10.0 B"), (10**12, "1.00 T"),
    ],
)  # fmt: skip
def test_human(number, text):
    assert human(number) == text
