"""accelerate on ranks of the CPU, set up by the configuration file of a user with GPUs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def launched(config_file: Path) -> Iterator[None]:
    """Set the environment that ``accelerate launch --config_file`` sets.

    FSDP2 runs on the CPU, but accelerate chooses it for GPUs only: it is told that there are some.
    """
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(["--config_file", str(config_file), "train.py"])
    arguments = _validate_launch_command(arguments)[0]
    found = prepare_multi_gpu_env(arguments)
    own = {key: value for key, value in found.items() if os.environ.get(key) != value}
    before = {key: os.environ.get(key) for key in own}
    methods: dict[str, Any] = {
        "_prepare_backend": lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU),
        "set_device": lambda self: setattr(self, "device", torch.device("cpu")),
    }
    originals = {name: getattr(PartialState, name) for name in methods}
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    try:
        os.environ.update(own)
        for name, method in methods.items():
            setattr(PartialState, name, method)
        yield
    finally:
        for name, method in originals.items():
            setattr(PartialState, name, method)
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
