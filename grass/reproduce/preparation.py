"""Inputs of a reproduction, read and checked before the first run, and once in each process that runs some."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from grass.config import GrassConfig
from grass.errors import ConfigError, ModelError, did_you_mean, library_errors
from grass.finetune.encoding import Encoder, Example
from grass.finetune.evaluation import Question, make_questions
from grass.finetune.model import check_model, context_of, positions_of
from grass.finetune.options import as_tuple
from grass.finetune.records import Conversation
from grass.finetune.scoring import Rule, rules_for
from grass.reproduce.methods import METHODS
from grass.reproduce.options import ReproduceOptions
from grass.reproduce.tables import TableData, limited, read_table


@dataclass
class Prepared:
    """Encoded records of a reproduction.

    Attributes:
        data: the records.
        encoder: their encoder.
        train: examples to train on, none longer than the context.
        num_long: number of those that are left out as they are longer.
        validation: examples of the search.
        tests: examples of each task, whose log-loss is computed.
        questions: prompts of each task, which the model answers.
        rules: rules of the expected answers of each task.
        num_cut: number of prompts whose beginning was cut.
    """

    data: TableData
    encoder: Encoder
    train: list[Example]
    num_long: int
    validation: list[Example]
    tests: dict[str, list[Example]]
    questions: dict[str, list[Question]]
    rules: dict[str, Mapping[str, Rule]]
    num_cut: int


@cache
def prepare(options: ReproduceOptions) -> Prepared:
    """Read and encode all records.

    Raises:
        ConfigError: all training records are longer than the context, or most prompts do not fit the model.
        DataError: a file is missing or malformed.
    """
    data = read_table(Path(options.data_dir), options.table, as_tuple(options.tasks), options.validation)
    model = model_without_weights(options)
    with library_errors(
        ModelError, f"model {options.model!r}: cannot load its tokenizer", "copy its files again"
    ):
        tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=options.trust_remote_code)
    encoder = Encoder(tokenizer, options.template, context_of(model, options.context))
    everything = encode(encoder, data.train)
    train = [example for example in everything if len(example.input_ids) <= encoder.context]
    if not train:
        raise ConfigError(
            f"all {len(data.train):,} training records are longer than {options.context} tokens: pass --context"
        )
    prepared = Prepared(
        data, encoder, train, len(everything) - len(train), encode(encoder, data.validation), {}, {}, {}, 0
    )
    for task, records in data.tests.items():
        chosen = limited(records, options.eval_limit)
        prepared.rules[task] = rules_for([str(record.answer) for record in records])
        prepared.questions[task], cut = make_questions(
            encoder, chosen, positions_of(model), options.max_new_tokens
        )
        prepared.num_cut += cut
        prepared.tests[task] = encode(encoder, [record for record in chosen if record.has_target])
    return prepared


def encode(encoder: Encoder, records: Sequence[Conversation]) -> list[Example]:
    """Return examples, which are not truncated."""
    return [Example(*pair) for record in records for pair in encoder.encode_one(record)]


def model_without_weights(options: ReproduceOptions) -> PreTrainedModel:
    """Return the model on the meta device.

    Raises:
        ConfigError: there is no such folder, or the weights are float16, which is not trained without loss scaling.
        ModelError: it is no causal language model.
    """
    trusted = options.trust_remote_code
    check_model(options.model, trust_remote_code=trusted)
    config = AutoConfig.from_pretrained(options.model, trust_remote_code=trusted)
    dtype = config.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    if dtype == torch.float16:
        raise ConfigError(f"model {options.model!r} is saved in float16: pass --dtype bfloat16 or float32")
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trusted
        )
    return model


def check_methods(options: ReproduceOptions, config: GrassConfig) -> None:
    """Make the optimizer of each method once, so that what cannot work is known before the first run.

    Raises:
        ConfigError: a method is unknown, needs a package, or does not fit the model; or the configuration sets what
            tells the methods from each other.
    """
    for name in ("sampler", "moments", "always_active", "min_probability", "seed"):
        if getattr(config, name) != getattr(GrassConfig(), name):
            raise ConfigError(
                f"leave out --{name.replace('_', '-')}: methods differ in it, and orders of the data are the seeds"
            )
    if config.fused_backward and options.micro_batch_size not in (None, options.batch_size):
        raise ConfigError("--fused-backward updates in every backward: leave out --micro-batch-size")
    for method in as_tuple(options.methods):
        if method not in METHODS:
            raise ConfigError(
                f"there is no method {method!r}{did_you_mean(method, METHODS)}; there are {', '.join(METHODS)}"
            )
        # Norms of weights need weights; in all else the method is the same as uniform sampling.
        name = "uniform" if method == "weight-norm" else method
        steps = min(options.steps, options.search_steps or options.steps)
        METHODS[name](model_without_weights(options), replace(config.for_run(steps), seed=0))
