"""Inputs of a run: reads and checks data and model, encodes the data, and tells what becomes of it."""

import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from grass.config import GrassConfig
from grass.errors import ConfigError
from grass.finetune.data import BadRecord, Records, read_records, split_heldout
from grass.finetune.encoding import Encoded, Encoder, Example, check_packing, pack
from grass.finetune.evaluation import Question, make_questions
from grass.finetune.loss import use_chunked_loss
from grass.finetune.model import check_method, check_model, context_of, load_model, pad_token_id, positions_of
from grass.finetune.options import FinetuneOptions, as_tuple
from grass.finetune.records import Conversation, Record
from grass.finetune.scoring import Rule, count_rules, rules_for
from grass.finetune.screen import Screen
from grass.layers import LayerMap

_MOST_SHOWN = 3  # of skipped records, on the screen
NUM_SAMPLES = 3  # of held-out records without an answer, generated before and after training


@dataclass
class Prepared:
    """Model and encoded data of a run whose inputs have been checked.

    Attributes:
        model: the model, on the device on which it is trained.
        encoder: the encoder of its data.
        dataset: rows to train on.
        heldout: examples of the held-out loss.
        questions: prompts that the model continues before and after training.
        questions_cut: number of questions whose beginning was cut.
        rules: rule of each expected answer; empty if nothing is scored.
        skipped: training records that cannot be used.
        digests: SHA-256 of the training and the held-out records.
        layers: layer map; None for full fine-tuning.
        chunked: True if losses are computed by `grass.finetune.loss.chunked_loss`.
        continues_text: True if all training records are plain texts.
    """

    model: PreTrainedModel
    encoder: Encoder
    dataset: Dataset
    heldout: list[Example]
    questions: list[Question]
    questions_cut: int
    rules: dict[str, Rule]
    skipped: list[BadRecord]
    digests: dict[str, str]
    layers: LayerMap | None
    chunked: bool
    continues_text: bool

    @property
    def pad_token_id(self) -> int:
        """Id of the padding token."""
        return pad_token_id(self.encoder.tokenizer)


def prepare(options: FinetuneOptions, config: GrassConfig, screen: Screen) -> Prepared:
    """Read and check all inputs. Nothing is written.

    Args:
        options: options with `model` and `data`.
        config: configuration of the method.
        screen: shows progress, and notes about the data, such as the number of truncated texts.
    """
    if torch.cuda.device_count() > 1:
        raise ConfigError(
            f"{torch.cuda.device_count()} GPUs are visible, and one is used: choose it with CUDA_VISIBLE_DEVICES=0"
        )
    if Path(options.model).exists():  # before the data is read, which may take long
        check_model(options.model, options.revision, trust_remote_code=options.trust_remote_code)
    records, heldout_records, skipped, digests = _read(options, config, screen)
    if not Path(options.model).exists():
        screen.say(f"loading {options.model} from the hub")
    model, tokenizer = load_model(
        options.model,
        options.dtype,
        options.revision,
        trust_remote_code=options.trust_remote_code,
        say=screen.say,
    )
    layers = check_method(model, options, config)
    _warn_of_bfloat16(model, options, screen)
    to_device(model)
    chunked = use_chunked_loss(model, options.loss, screen.say)
    encoder = Encoder(tokenizer, options.template, context_of(model, options.context))
    continues_text = not any(isinstance(record, Conversation) for record in records)
    if not continues_text:
        _use_template(encoder, model, options, screen)
    elif options.template != "auto":
        screen.say("all records are plain texts: --template has no effect")
    if not heldout_records:
        screen.say("no held-out records: pass --eval or --eval-fraction for held-out loss and accuracy")
    train_set = _encode(encoder, records, "training", screen)
    dataset = train_set.dataset()
    if options.packing:
        check_packing(model)
        dataset = pack(dataset, encoder.context)
        screen.say(f"{len(train_set.examples):,} texts are packed into {len(dataset):,} rows")
    heldout = _encode_heldout(encoder, heldout_records, screen)
    questions, questions_cut, rules = _make_questions(
        encoder, heldout_records, model, options, config, screen
    )
    return Prepared(
        model,
        encoder,
        dataset,
        heldout,
        questions,
        questions_cut,
        rules,
        skipped,
        digests,
        layers,
        chunked,
        continues_text,
    )


def to_device(model: PreTrainedModel) -> None:
    """Move a model to the GPU, if there is one."""
    if torch.cuda.is_available():
        model.to("cuda")  # type: ignore[arg-type]  # transformers annotates `to` with another signature


def stop_at_end_of_reply(model: PreTrainedModel, encoder: Encoder) -> int | None:
    """Add the token that ends a reply to those at which generation stops: base models may have another EOS token.

    Returns:
        The token; None if generation stops there already, or if no special token ends a reply.
    """
    ends = model.generation_config.eos_token_id or encoder.tokenizer.eos_token_id
    ends, end = list(ends) if isinstance(ends, list) else [ends], encoder.end_of_reply()
    if end is None or end in ends:
        return None
    model.generation_config.eos_token_id = [*ends, end]
    return end


def _read(
    options: FinetuneOptions, config: GrassConfig, screen: Screen
) -> tuple[list[Record], list[Record], list[BadRecord], dict[str, str]]:
    """Return training records, held-out records, those that are skipped, and the digests."""
    columns = options.renamed_columns()
    read = read_records(as_tuple(options.data), columns=columns, max_skipped=options.max_skipped)
    _report_skipped(read, screen)
    _report_unused(read, "training", screen)
    digests = {"data": read.digest}
    records, heldout = read.records, list[Record]()
    if options.eval:
        read_heldout = read_records(as_tuple(options.eval), columns=columns, evaluation=True)
        _report_unused(read_heldout, "held-out", screen)
        heldout, digests["eval"] = read_heldout.records, read_heldout.digest
    elif options.eval_fraction:
        records, heldout = split_heldout(records, options.eval_fraction, config.seed)
    if options.eval_limit is not None and len(heldout) > options.eval_limit:
        screen.say(f"{options.eval_limit:,} of {len(heldout):,} held-out records are used (--eval-limit)")
        heldout = random.Random(config.seed).sample(heldout, options.eval_limit)
    shared = len({record.question for record in heldout} & {record.question for record in records})
    if shared:
        screen.say(f"warning: {shared:,} held-out records are also among the training records")
    return records, heldout, read.bad, digests


def _warn_of_bfloat16(model: PreTrainedModel, options: FinetuneOptions, screen: Screen) -> None:
    if not any(p.dtype == torch.bfloat16 for p in model.parameters()):
        if options.rounding != FinetuneOptions.rounding:
            screen.say("no weights are bfloat16: --rounding has no effect")
    else:
        if options.rounding == "nearest":
            screen.say(
                "warning: --rounding nearest loses small updates of bfloat16 weights: use master, or stochastic, which "
                "needs no memory"
            )
        if not torch.cuda.is_available():
            factor = _seconds_of_product(torch.bfloat16) / _seconds_of_product(torch.float32)
            if factor > 2:
                screen.say(
                    f"warning: on this CPU bfloat16 is about {factor:.0f} times slower than --dtype float32"
                )


def _seconds_of_product(dtype: torch.dtype) -> float:
    """Return the time of some matrix products on the CPU, which may have no arithmetic for a dtype."""
    matrix = torch.ones(512, 512, dtype=dtype, device="cpu")
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _use_template(encoder: Encoder, model: PreTrainedModel, options: FinetuneOptions, screen: Screen) -> None:
    """Save the template with the model, so that every program asks as it was trained; tell which it is."""
    end = stop_at_end_of_reply(model, encoder)
    if end is not None:
        screen.say(f"generation stops at {encoder.tokenizer.convert_ids_to_tokens(end)}, which ends a reply")
    if encoder.chat_template == encoder.tokenizer.chat_template:
        screen.say("conversations are written with the model's own chat template")
        return
    named = "plain" if options.template == "plain" else "alpaca"
    reason = " as the model has no chat template" if options.template == "auto" else ""
    screen.say(f"conversations are written with the template {named}{reason}; it is saved with the model")
    encoder.tokenizer.chat_template = encoder.chat_template


def _encode(encoder: Encoder, records: list[Record], kind: str, screen: Screen) -> Encoded:
    screen.start(f"encoding {kind} texts", len(records), unit="text", delay=2.0)
    encoded = encoder.encode(records, f"{kind} records", screen.advance)
    screen.stop()
    if encoded.num_cut:
        share = _share(encoded.num_cut, encoded.num_texts, f"{kind} texts")
        screen.say(f"{share} are longer than {encoder.context} tokens and are truncated (--context)")
    if encoded.num_unrolled:
        share = _share(encoded.num_unrolled, encoded.num_texts, f"{kind} texts")
        screen.say(f"{share} are learnt reply by reply, as the template writes earlier turns otherwise")
    if encoded.num_divided:
        share = _share(encoded.num_divided, encoded.num_texts, f"{kind} texts")
        screen.say(f"{share} are longer than {encoder.context} tokens and are divided (--context)")
    if encoded.num_dropped:
        screen.say(
            f"{encoded.num_dropped:,} ({encoded.num_dropped / encoded.num_texts:.1%}) are left out: their prompt fills "
            "the context, so that no token to learn remains"
        )
    return encoded


def _encode_heldout(encoder: Encoder, records: list[Record], screen: Screen) -> list[Example]:
    learnable = [record for record in records if record.has_target]
    if len(learnable) < len(records):
        screen.say(
            f"{len(records) - len(learnable):,} of {len(records):,} held-out records have no output: "
            "they count for the accuracy only"
        )
    return _encode(encoder, learnable, "held-out", screen).examples if learnable else []


def _make_questions(
    encoder: Encoder,
    records: list[Record],
    model: PreTrainedModel,
    options: FinetuneOptions,
    config: GrassConfig,
    screen: Screen,
) -> tuple[list[Question], int, dict[str, Rule]]:
    """Return the questions, the number of those that are cut, and the rules by which they are scored."""
    conversations = [record for record in records if isinstance(record, Conversation)]
    asked = [record for record in conversations if record.answer is not None]
    rules = rules_for([str(record.answer) for record in asked])  # of the whole file, not of a sample
    if not asked:
        asked = [record for record in conversations if record.reply and record.question][:NUM_SAMPLES]
    if len(asked) > options.eval_answers:
        asked = random.Random(config.seed).sample(asked, options.eval_answers)
    positions = positions_of(model)
    questions, num_cut = make_questions(encoder, asked, positions, options.max_new_tokens)
    if positions is not None and num_cut:
        share = _share(num_cut, len(questions), "questions")
        room = f"{positions - options.max_new_tokens} tokens that {options.max_new_tokens} new ones leave"
        screen.say(
            f"{share} are longer than the {room} of the model's {positions} positions; their beginning is cut"
        )
    if rules and questions:
        counts = count_rules(rules, (question.expected for question in questions)).items()
        named = ", ".join(f"{name} ({count:,})" for name, count in counts)
        screen.say(f"held-out answers are scored by these rules: {named}")
    return questions, num_cut, rules


def _report_skipped(read: Records, screen: Screen) -> None:
    if read.bad:
        total = len(read.records) + len(read.bad)
        screen.say(
            f"{len(read.bad):,} of {total:,} training records cannot be used and are skipped; "
            "all of them are listed in skipped.jsonl of the run folder"
        )
        for bad in read.bad[:_MOST_SHOWN]:
            screen.say(f"  {bad}")


def _report_unused(read: Records, kind: str, screen: Screen) -> None:
    if read.unused:
        keys = [f"{key} ({count:,} records)" for key, count in read.unused.items()]
        more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
        screen.say(f"keys of {kind} records that are not used: {', '.join(keys[:8])}{more}")


def _share(count: int, total: int, name: str) -> str:
    return f"{count:,} of {total:,} {name} ({count / total:.1%})"
