"""Inputs of a reproduction, read and checked before the first run, and once in each process that runs some."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from grass.config import GrassConfig
from grass.errors import ConfigError, DataError, ModelError, did_you_mean, library_errors
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
        validation: examples of the search, none longer than the context.
        num_long: number of those that are left out of both as they are longer.
        tests: examples of each task, whose log-loss is computed: their outputs are right by the rule of the answer,
            and fit the model's positions.
        num_wrong: number of outputs of each task that are wrong by the rule of the answer.
        questions: prompts of each task, which the model answers.
        rules: rules of the expected answers of each task.
        num_cut: number of prompts whose beginning was cut.
    """

    data: TableData
    encoder: Encoder
    train: list[Example]
    validation: list[Example]
    num_long: int = 0
    tests: dict[str, Sequence[Example]] = field(default_factory=dict)
    num_wrong: dict[str, int] = field(default_factory=dict)
    questions: dict[str, list[Question]] = field(default_factory=dict)
    rules: dict[str, Mapping[str, Rule]] = field(default_factory=dict)
    num_cut: int = 0


@cache
def prepare(options: ReproduceOptions) -> Prepared:
    """Read and encode all records.

    Raises:
        ConfigError: all training or validation records are longer than the context, or most prompts do not fit the
            model.
        DataError: a file is missing or malformed, or a task has no output of which a log-loss can be computed.
    """
    data = read_table(Path(options.data_dir), options.table, as_tuple(options.tasks), options.validation)
    model = model_without_weights(options)
    with library_errors(
        ModelError, f"model {options.model!r}: cannot load its tokenizer", "copy its files again"
    ):
        tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=options.trust_remote_code)
    encoder = Encoder(tokenizer, options.template, context_of(model, options.context))
    train, validation = encode(encoder, data.train), encode(encoder, data.validation)
    prepared = Prepared(data, encoder, _within(encoder.context, train), _within(encoder.context, validation))
    for kind, short, whole in (
        ("training", prepared.train, train),
        ("validation", prepared.validation, validation),
    ):
        if not short:
            raise ConfigError(
                f"all {len(whole):,} {kind} records are longer than {options.context} tokens: pass --context"
            )
        prepared.num_long += len(whole) - len(short)
    positions = positions_of(model)
    for task, records in data.tests.items():
        rules = rules_for([str(record.answer) for record in records])
        outputs = [record for record in records if record.has_target]
        right = [r for r in outputs if rules[str(r.answer)].is_right(r.reply, str(r.answer))]
        examples = _within(positions, encode(encoder, right))
        if not examples:
            raise DataError(
                f"{Path(options.data_dir, task, 'test.json')}: no record has an output, of which the log-loss is "
                "computed, that is right by the rule of its answer and fits the model: pass --tasks without this one"
            )
        prepared.rules[task] = rules
        prepared.num_wrong[task] = len(outputs) - len(right)
        prepared.tests[task] = limited(examples, options.eval_limit)
        prepared.questions[task], cut = make_questions(
            encoder, limited(records, options.eval_limit), positions, options.max_new_tokens
        )
        prepared.num_cut += cut
    return prepared


def _within(length: int | None, examples: Sequence[Example]) -> list[Example]:
    return [example for example in examples if length is None or len(example.input_ids) <= length]


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
