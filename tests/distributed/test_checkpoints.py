"""Failures these tests catch: a checkpoint that loads on the same number of ranks only; states of empty shards, or of
layers that never trained, lost on the way; a method that begins anew; a whole state dict taken for that of a shard.
"""

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import grass
from grass.errors import StateMismatchError
from grass.optim.sharding import local
from tests.support.sharded import Training, whole

pytestmark = [
    pytest.mark.plain_only(reason="processes with the interpreter are slow, and shards are ordinary tensors"),
    pytest.mark.filterwarnings("ignore:.*torch.distributed is (disabled, )?unavailable:UserWarning"),
]

TRAINING = Training(block="ragged", width=7)
STEPS = 20
VARIANTS = {
    "probing": (TRAINING, 2),
    "training": (TRAINING, 8),
    "drawn ahead": (TRAINING, 11),
    "before a measurement": (replace(TRAINING, config={"sampler": "remeasured", "probe_steps": 1}), 5),
    "fused backward": (replace(TRAINING, config={"fused_backward": True}), 8),
    "resident": (replace(TRAINING, config={"offload": "resident"}, dtype=torch.float32), 8),
    "reset, exact weights": (
        replace(
            TRAINING,
            config={"moments": "reset"},
            options={"master_weights": True},
            dtype=torch.bfloat16,
            block="plain",
        ),
        13,
    ),
}


def state_of(model, opt):
    model_state, optimizer_state = get_state_dict(model, opt)
    return {"model": model_state, "optimizer": optimizer_state}


def weights(model):
    return {name: whole(p) for name, p in model.named_parameters()}


def save(training, stop, folder, asynchronously=False):
    """Train, save, and train on; the weights at the end."""
    model, opt = training.make()
    training.run(model, opt, 0, stop)
    if asynchronously:
        group = dist.new_group(backend="gloo")  # training goes on in the other one
        saving = dcp.async_save(state_of(model, opt), checkpoint_id=folder, process_group=group)
        training.run(model, opt, stop, STEPS)
        saving.result()
    else:
        dcp.save(state_of(model, opt), checkpoint_id=folder)
        training.run(model, opt, stop, STEPS)
    return weights(model), opt.importance, opt.draw_counts


def resume(training, start, folder):
    model, opt = training.make()
    state = state_of(model, opt)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert opt.step_count == start
    training.run(model, opt, start, STEPS)
    return weights(model), opt.importance, opt.draw_counts


def largest_difference(first, second):
    return max(float((p.double() - second[name].double()).abs().max()) for name, p in first.items())


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_two_ranks_resume_bitwise_and_other_numbers_within_rounding(two, four, tmp_path, variant):
    training, stop = VARIANTS[variant]
    folder = str(tmp_path)
    expected, importance, counts = two.run(save, replace(training, mesh=(2,)), stop, folder)[0]
    again = two.run(resume, replace(training, mesh=(2,)), stop, folder)
    for found, found_importance, found_counts in again:
        assert largest_difference(expected, found) == 0
        assert torch.equal(found_importance, importance)
        assert found_counts == counts
    limit = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[training.dtype]
    others = {
        "4": lambda: four.run(resume, replace(training, mesh=(4,)), stop, folder)[0],
        "2 x 2": lambda: four.run(resume, replace(training, mesh=(2, 2)), stop, folder)[0],
        "1": lambda: resume(training, stop, folder),
    }
    for name, run in others.items():
        found, _, found_counts = run()
        assert largest_difference(expected, found) < limit, name
        assert found_counts == counts, name


def test_the_state_of_the_method_is_saved_once(two, tmp_path):
    """Not a copy by each rank."""
    two.run(save, replace(TRAINING, mesh=(2,)), 8, str(tmp_path / "two"))
    save(TRAINING, 8, str(tmp_path / "one"))

    def sizes(folder):
        metadata = dcp.FileSystemReader(str(folder)).read_metadata()
        return {i: info.length for i, info in metadata.storage_data.items() if ".grass." in i.fqn}

    assert len(sizes(tmp_path / "one")) > 10
    assert sizes(tmp_path / "two") == sizes(tmp_path / "one")


@pytest.mark.parametrize("offload", ["none", "resident"])
def test_an_asynchronous_save_has_the_state_of_its_beginning(two, tmp_path, offload):
    training = replace(TRAINING, mesh=(2,), config={"offload": offload}, dtype=torch.float32)
    expected = two.run(save, training, 8, str(tmp_path), True)[0][0]
    for found in two.run(resume, training, 8, str(tmp_path)):
        assert largest_difference(expected, found[0]) == 0


def whole_state_dict(training):
    """Save as one file, as for a machine without ranks, and load it again from rank 0."""
    model, opt = training.make()
    training.run(model, opt, 0, 8)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model_state, optimizer_state = get_state_dict(model, opt, options=options)
    kept = copy.deepcopy((model_state, optimizer_state))
    training.run(model, opt, 8, STEPS)
    model_2, opt_2 = training.make()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model_2, kept[0], options=options)
    set_optimizer_state_dict(model_2, opt_2, kept[1], options=options)
    training.run(model_2, opt_2, 8, STEPS)
    return weights(model), weights(model_2)


def test_a_whole_state_dict_is_saved_and_loaded(two):
    for expected, found in two.run(whole_state_dict, replace(TRAINING, mesh=(2,))):
        assert largest_difference(expected, found) == 0


def layout_of_states(training):
    """Return type and shape of the states of a stepped optimizer, and of those in its state dict."""
    model, opt = training.make()
    training.run(model, opt, 0, 8)
    states = [
        (type(value).__name__, tuple(value.shape) == tuple(local(p).shape))
        for p, state in opt.state.items()
        for key, value in state.items()
        if key != "step"
    ]
    saved = opt.state_dict()
    in_dict = [
        (type(value).__name__, tuple(value.shape) == tuple(p.shape), value.placements == p.placements)
        for p, index in zip(opt.param_groups[0]["params"], saved["param_groups"][0]["params"], strict=True)
        for key, value in saved["state"][index].items()
        if key != "step"
    ]
    counters = [float(state["step"]) for state in opt.state.values()]
    return set(states), set(in_dict), counters


def test_states_are_local_tensors_and_dtensors_in_state_dicts(two):
    """Point 1: moments that are DTensors inside would end the process in `torch.distributed.checkpoint`."""
    answers = two.run(layout_of_states, replace(TRAINING, mesh=(2,)))
    for states, in_dict, _ in answers:
        assert states == {("Tensor", True)}
        assert in_dict == {("DTensor", True, True)}
    assert answers[0][2] == answers[1][2]  # point 4: counters of empty shards count, too


def reload(training):
    """Load the optimizer's own state in the middle of a run, and go on."""
    model, opt = training.make()
    training.run(model, opt, 0, 8)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    training.run(model, opt, 8, STEPS)
    return weights(model), opt.importance


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_state_that_is_loaded_between_steps_changes_nothing(two, clip):
    """Norms are summed over the ranks afterwards, too."""
    training = replace(TRAINING, mesh=(2,), options={"max_grad_norm": clip})
    expected_model, expected = replace(training, mesh=None).make()
    replace(training, mesh=None).run(expected_model, expected, 0, STEPS)
    first, second = two.run(reload, training)
    assert torch.equal(first[1], second[1])
    assert torch.allclose(first[1], expected.importance, rtol=1e-5)
    assert largest_difference(weights(expected_model), first[0]) < 1e-9


def load_what_does_not_fit(training):
    model, opt = training.make()
    training.run(model, opt, 0, 8)
    before = weights(model)
    saved = opt.state_dict()
    whole_states = {
        index: {key: whole(value) for key, value in state.items()} for index, state in saved["state"].items()
    }
    messages = []
    other_model, other = replace(training, mesh=(dist.get_world_size(), 1)).make()
    replace(training, mesh=(dist.get_world_size(), 1)).run(other_model, other, 0, 8)
    for given in ({**saved, "state": whole_states}, other.state_dict()):
        try:
            opt.load_state_dict(given)
        except StateMismatchError as error:
            messages.append(str(error))
    assert isinstance(opt, grass.GrassAdamW)
    training.run(model, opt, 8, STEPS)
    expected_model, expected = training.make()
    training.run(expected_model, expected, 0, STEPS)
    return messages, largest_difference(weights(expected_model), weights(model)), before


def test_states_that_are_sharded_otherwise_are_refused_and_nothing_changes(two):
    training = replace(TRAINING, mesh=(2,), options={"max_grad_norm": 0.05})
    for messages, difference, _ in two.run(load_what_does_not_fit, training):
        assert len(messages) == 2
        assert "full_state_dict=True" in messages[0]
        assert "sharded otherwise" in messages[1]
        assert difference == 0
