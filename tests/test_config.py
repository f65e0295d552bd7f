"""Failures these tests catch: a setting out of range that is accepted, a refusal that does not say what to
do, a bool or a string taken for a number, a configuration that changes after it was checked, a draw more
than a period ahead, more active layers or higher floors than the model can give.
"""

import copy
import dataclasses
import pickle

import pytest

from grass import ConfigError, GrassConfig, GrassError

BAD = [
    ({"active_layers": 0}, "active_layers must be an integer of at least 1, not 0"),
    ({"active_layers": -1}, "at least 1"),
    ({"active_layers": 1.5}, "integer"),
    ({"active_layers": True}, "integer"),
    ({"active_layers": "2"}, "integer"),
    ({"probe_steps": -1}, "probe_steps must be an integer of at least 0"),
    ({"sample_interval": 0}, "sample_interval must be an integer of at least 1"),
    ({"sample_interval": -5}, "at least 1"),
    ({"update_interval": 0}, "update_interval must be an integer of at least 1"),
    ({"sample_interval": 4, "update_interval": 6}, "must be a multiple of sample_interval (4)"),
    ({"sample_interval": 4, "update_interval": 2}, "multiple"),
    ({"temperature": 0}, "temperature must be a positive number"),
    ({"temperature": -1.0}, "positive"),
    ({"temperature": float("inf")}, "positive"),
    ({"temperature": float("nan")}, "positive"),
    ({"temperature": "1"}, "positive"),
    ({"ema": 0}, "ema must be in (0, 1]"),
    ({"ema": 1.001}, "(0, 1]"),
    ({"ema": -0.5}, "(0, 1]"),
    ({"ema": float("nan")}, "(0, 1]"),
    ({"ema": True}, "(0, 1]"),
    ({"min_probability": -0.1}, "[0, 1]"),
    ({"min_probability": 1.1}, "[0, 1]"),
    ({"min_probability": float("nan")}, "[0, 1]"),
    ({"importance_scale": "max"}, "one of mean, log, zscore, none"),
    ({"sampler": "random"}, "one of adaptive, static, uniform, weight_norm, cyclic, shuffled, remeasured"),
    ({"moments": "drop"}, "one of keep, reset"),
    ({"offload": "disk"}, "one of auto, none, resident, streamed"),
    ({"offload": None}, "one of auto, none, resident, streamed"),
    ({"always_active": ""}, '"none"'),
    ({"always_active": []}, "non-empty list"),
    ({"always_active": ["lm_head*", ""]}, "name patterns"),
    ({"always_active": [3]}, "name patterns"),
    ({"draw_ahead": -1}, "draw_ahead must be an integer of at least 0"),
    ({"sample_interval": 5, "update_interval": 5, "draw_ahead": 5}, "at most sample_interval - 1 (4)"),
    ({"seed": -1}, "seed must be an integer of at least 0"),
    ({"seed": 0.5}, "integer"),
]


@pytest.mark.parametrize(("options", "remedy"), BAD, ids=[str(options) for options, _ in BAD])
def test_a_bad_value_gets_one_clear_line(options: dict, remedy: str) -> None:
    with pytest.raises(ConfigError) as raised:
        GrassConfig(**options)
    message = str(raised.value)
    assert remedy in message
    assert next(iter(options)) in message
    assert "\n" not in message


def test_config_errors_are_value_errors_and_ours() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, GrassError)


@pytest.mark.parametrize(
    "options",
    [
        {"active_layers": 1, "probe_steps": 0, "sample_interval": 1, "update_interval": 1, "draw_ahead": 0},
        {"sample_interval": 5, "update_interval": 5, "draw_ahead": 4},
        {"ema": 1},
        {"min_probability": 0},
        {"min_probability": 1},
        {"temperature": 1e-300},
        {"seed": 2**32 - 1},
    ],
    ids=str,
)
def test_values_at_the_edge_are_kept_as_they_are(options: dict) -> None:
    """And those that are not given keep their defaults."""
    config = GrassConfig(**options)
    assert dataclasses.asdict(config) == {**dataclasses.asdict(GrassConfig()), **options}
    assert (
        config.effective_draw_ahead == config.draw_ahead == options.get("draw_ahead", GrassConfig.draw_ahead)
    )


def test_a_config_does_not_change_once_checked() -> None:
    config = GrassConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.active_layers = 0
    patterns = ["lm_head*"]
    config = GrassConfig(always_active=patterns)
    patterns.append("")
    assert config.always_active == ("lm_head*",)
    assert hash(config) == hash(GrassConfig(always_active=("lm_head*",)))


def test_patterns_are_told_from_the_two_words() -> None:
    assert GrassConfig().always_active_patterns is None
    assert GrassConfig(always_active="none").always_active_patterns is None
    assert GrassConfig(always_active="lm_head*").always_active_patterns == ("lm_head*",)
    assert GrassConfig(always_active=["a", "b"]).always_active_patterns == ("a", "b")


def test_draw_ahead_is_clamped_where_a_period_is_one_step() -> None:
    one = GrassConfig(sample_interval=1, update_interval=1, draw_ahead=1)
    assert one.effective_draw_ahead == 0
    assert GrassConfig(draw_ahead=3).effective_draw_ahead == 3


def test_what_depends_on_the_number_of_layers() -> None:
    config = GrassConfig(active_layers=4)
    config.check_layers(4)
    with pytest.raises(ConfigError, match="pass active_layers between 1 and 3"):
        config.check_layers(3)
    floor = GrassConfig(min_probability=0.25)
    floor.check_layers(4)
    with pytest.raises(ConfigError, match=r"min_probability 0.25 .* pass at most 0.2$"):
        floor.check_layers(5)


def test_copies_are_equal() -> None:
    config = GrassConfig(temperature=0.5, always_active=["a*"], sampler="static")
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("setting", "remedy"), [({"seed": 2**32}, "below 2"), ({"always_active": 5}, "name patterns")]
)
def test_settings_other_libraries_would_choke_on_are_refused_here(setting, remedy):
    with pytest.raises(ConfigError, match=remedy):
        GrassConfig(**setting)


@pytest.mark.parametrize(
    ("given", "num_steps", "expected"),
    [(20, 1000, 20), (20, 80, 20), (20, 79, 19), (20, 3, 1), (20, 2, 1), (20, 1, 0), (0, 10, 0)],
)
def test_a_probe_takes_a_quarter_of_a_run_at_most(given, num_steps, expected):
    config = GrassConfig(probe_steps=given, active_layers=3)
    assert config.for_run(num_steps) == GrassConfig(probe_steps=expected, active_layers=3)
