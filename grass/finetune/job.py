"""A fine-tuning run from beginning to end: check, create the run folder, train, evaluate, plot, summarize."""

import os
import platform
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import grass
from grass.config import GrassConfig
from grass.errors import RunFolderError, SaveError, first_line
from grass.finetune.data import BadRecord, RecordFile, file_digest, read_records, split_heldout
from grass.finetune.demo import demo_model, demo_tokenizer, make_demo, one_thread
from grass.finetune.disk import bytes_needed, check_space
from grass.finetune.encoding import Encoded, Encoder, Example
from grass.finetune.evaluation import Answer, Question, answer_questions, heldout_loss, make_questions
from grass.finetune.loss import use_chunked_loss
from grass.finetune.model import check_method, check_model, context_of, load_model, pad_token_id, positions_of
from grass.finetune.options import FinetuneOptions
from grass.finetune.picture import draw_picture
from grass.finetune.records import Chat, Instruction, Record
from grass.finetune.run_folder import (
    RunFolder,
    append_row,
    check_is_free,
    default_path,
    read_rows,
    write_json,
)
from grass.finetune.scoring import Rule, count_rules, rules_for
from grass.finetune.screen import Screen
from grass.finetune.stopping import Stopped
from grass.finetune.summary import make_results
from grass.finetune.training import count_steps, train
from grass.layers import LayerMap
from grass.sampling import SAMPLER_CLASSES

_MOST_SHOWN = 3  # of skipped records, on the screen


@dataclass
class Prepared:
    """Model and tokenized data of a run whose inputs have been checked."""

    model: PreTrainedModel
    encoder: Encoder
    examples: list[Example]
    heldout: list[Example]
    questions: list[Question]  # that the model answers by generation
    questions_cut: int  # number of questions whose beginning was cut
    rules: dict[str, Rule]  # of each expected answer
    skipped: list[BadRecord]  # training records that cannot be used
    layers: LayerMap | None  # None for full fine-tuning
    chunked: bool  # losses are computed by `chunked_loss`

    @property
    def pad_token_id(self) -> int:
        """Id of the padding token."""
        return pad_token_id(self.encoder.tokenizer)


def start_run(
    options: FinetuneOptions, config: GrassConfig, screen: Screen, command: Sequence[str] = ()
) -> dict[str, Any]:
    """Execute a new run.

    Nothing is written before model, data, layers and options have been checked.

    Args:
        options, config: options of the run, configuration of the method.
        screen: shows progress.
        command: the command line, which is saved with the run.

    Returns:
        The values of the final table.

    Raises:
        GrassError: invalid input.
        SaveError: the disk has no room. If the run has begun, `resume_run` continues it.
        Stopped: the user stopped the run; `resume_run` continues it.
    """
    path = Path(options.output) if options.output else default_path()
    check_is_free(path)
    prepared = None
    if options.is_demo:
        model = demo_model(demo_tokenizer(), config.seed)
        check_method(model, options, config)
        use_chunked_loss(model, options.loss, screen.say)
    else:
        prepared = prepare(options, config, screen)
        _check_space(path, options, prepared)
    files = [file for file in (options.data, options.eval) if file]
    record = {
        "command": list(command),
        "options": asdict(_with_absolute_paths(options)),
        "config": asdict(config),
        "seed": config.seed,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "data_sha256": {_absolute(file): file_digest(file) for file in files},
        "versions": {
            "grass": grass.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    return _execute(RunFolder.create(path, record), options, config, prepared, screen)


def resume_run(path: Path, screen: Screen) -> dict[str, Any]:
    """Continue a stopped run with its saved options; the result is that of a run that was never stopped.

    Args:
        path: the run folder.
        screen: shows progress.

    Raises:
        RunFolderError: the folder contains no run, a finished run, or a run whose data has changed.
        Stopped: the user stopped the run again.
    """
    folder = RunFolder.open(path)
    if folder.state == "finished":
        raise RunFolderError(f"{path}: the run is finished; there is nothing to continue")
    try:
        options = FinetuneOptions(**folder.record["options"])
        config = GrassConfig(**folder.record["config"])
    except (KeyError, TypeError) as error:
        raise RunFolderError(
            f"{path}: saved by another version of grass, so it cannot be continued ({error})"
        ) from None
    for file, digest in folder.record["data_sha256"].items():
        if not Path(file).is_file() or file_digest(file) != digest:
            raise RunFolderError(f"{path}: {file} has changed since the run began, so it cannot be continued")
    prepared = None if options.is_demo else prepare(options, config, screen)
    if prepared is not None and folder.state != "trained":
        _check_space(path, options, prepared)
    return _execute(folder, options, config, prepared, screen)


def _with_absolute_paths(options: FinetuneOptions) -> FinetuneOptions:
    """Return the options with which a run can be continued from any folder; a name on the hub stays one."""
    return replace(
        options,
        model=_absolute(options.model) if os.path.exists(options.model) else options.model,
        data=_absolute(options.data),
        eval=_absolute(options.eval),
        output=_absolute(options.output),
    )


def _absolute(path: str) -> str:
    return os.path.abspath(path) if path else ""


def _check_space(path: Path, options: FinetuneOptions, prepared: Prepared) -> None:
    steps = count_steps(options, len(prepared.examples))
    check_space(path, bytes_needed(prepared.model, options.save_steps, steps))


def prepare(options: FinetuneOptions, config: GrassConfig, screen: Screen) -> Prepared:
    """Read and check all inputs. Nothing is written.

    Args:
        options: options with `model` and `data`.
        config: configuration of the method.
        screen: shows notes about the data, such as the number of truncated texts.
    """
    if Path(options.model).exists():
        check_model(options.model)  # before the data is read, which may take long
    read = read_records(options.data, max_skipped=options.max_skipped)
    _report_skipped(read, screen)
    _report_unused(options.data, read, screen)
    records, heldout_records = read.records, list[Record]()
    if options.eval:
        read_heldout = read_records(options.eval, evaluation=True)
        _report_unused(options.eval, read_heldout, screen)
        heldout_records = read_heldout.records
    elif options.eval_fraction:
        records, heldout_records = split_heldout(records, options.eval_fraction, config.seed)
    if not Path(options.model).exists():
        screen.say(f"loading {options.model} from the hub")
    model, tokenizer = load_model(options.model, options.dtype)
    layers = check_method(model, options, config)
    if options.rounding == "nearest" and any(p.dtype == torch.bfloat16 for p in model.parameters()):
        screen.say(
            "warning: --rounding nearest loses small updates of bfloat16 weights: use master, or stochastic, which "
            "needs no memory"
        )
    _to_device(model)
    chunked = use_chunked_loss(model, options.loss, screen.say)
    encoder = Encoder(tokenizer, options.template, context_of(model, options.context))
    train_set = encoder.encode(records, options.data)
    _report_truncation(train_set, "training", encoder.context, screen)
    heldout = Encoded()
    learnable = [record for record in heldout_records if record.has_target]
    if len(learnable) < len(heldout_records):
        screen.say(
            f"{len(heldout_records) - len(learnable):,} of {len(heldout_records):,} held-out records have no output: "
            "they count for the accuracy only"
        )
    if learnable:
        heldout = encoder.encode(learnable, options.eval or options.data)
        _report_truncation(heldout, "held-out", encoder.context, screen)
    seen = {record.question for record in records}
    shared = len({record.question for record in heldout_records} & seen)
    if shared:
        screen.say(f"warning: {shared:,} held-out records are also among the training records")
    if not heldout_records:
        screen.say("no held-out records: pass --eval FILE or --eval-fraction for held-out loss and accuracy")
    asked = [r for r in heldout_records if isinstance(r, (Instruction, Chat)) and r.answer is not None]
    rules = rules_for([str(record.answer) for record in asked])  # of the whole file, not of a sample
    if len(asked) > options.eval_answers:
        asked = random.Random(config.seed).sample(asked, options.eval_answers)
    positions = positions_of(model)
    questions, questions_cut = make_questions(encoder, asked, positions, options.max_new_tokens)
    if positions is not None and questions_cut:
        share = _share(questions_cut, len(questions), "questions")
        room = f"{positions - options.max_new_tokens} tokens that {options.max_new_tokens} new ones leave"
        screen.say(
            f"{share} are longer than the {room} of the model's {positions} positions; their beginning is cut"
        )
    if questions:
        counts = count_rules(rules, (question.expected for question in questions)).items()
        named = ", ".join(f"{name} ({count:,})" for name, count in counts)
        screen.say(f"held-out answers are scored by these rules: {named}")
    return Prepared(
        model,
        encoder,
        train_set.examples,
        heldout.examples,
        questions,
        questions_cut,
        rules,
        read.bad,
        layers,
        chunked,
    )


def _report_skipped(read: RecordFile, screen: Screen) -> None:
    if read.bad:
        total = len(read.records) + len(read.bad)
        screen.say(
            f"{len(read.bad):,} of {total:,} training records cannot be used and are skipped; "
            "all of them are listed in skipped.jsonl of the run folder"
        )
        for bad in read.bad[:_MOST_SHOWN]:
            screen.say(f"  {bad}")


def _report_unused(path: str, read: RecordFile, screen: Screen) -> None:
    if read.unused:
        keys = [f"{key} ({count:,} records)" for key, count in read.unused.items()]
        more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
        screen.say(f"{path}: keys that are not used: {', '.join(keys[:8])}{more}")


def _report_truncation(encoded: Encoded, kind: str, context: int, screen: Screen) -> None:
    if encoded.num_cut:
        share = _share(encoded.num_cut, encoded.num_texts, f"{kind} texts")
        screen.say(f"{share} are longer than {context} tokens and are truncated (--context)")
    if encoded.num_dropped:
        screen.say(
            f"{encoded.num_dropped:,} ({encoded.num_dropped / encoded.num_texts:.1%}) are left out: their prompt fills "
            "the context, so that no token to learn remains"
        )


def _share(count: int, total: int, name: str) -> str:
    return f"{count:,} of {total:,} {name} ({count / total:.1%})"


def _execute(
    folder: RunFolder,
    options: FinetuneOptions,
    config: GrassConfig,
    prepared: Prepared | None,
    screen: Screen,
) -> dict[str, Any]:
    try:
        if prepared is None:
            with one_thread():
                options = make_demo(folder, options, config, screen)
                prepared = prepare(options, config, screen)
                return _train_and_evaluate(folder, options, config, prepared, screen)
        return _train_and_evaluate(folder, options, config, prepared, screen)
    except (Stopped, KeyboardInterrupt) as reason:
        screen.stop()
        if folder.state != "trained":
            folder.update(state="stopped")
        raise Stopped(
            f"{reason if str(reason) else 'stopped'}; continue with: grass finetune --resume {folder.path}"
        ) from None
    except BrokenPipeError:  # nothing reads stderr, which is no file of the run
        raise
    except (SaveError, OSError) as error:
        screen.stop()
        with suppress(OSError):  # the disk may still be full
            if folder.state != "trained":
                folder.update(state="stopped")
        raise SaveError(
            f"{folder.path}: {first_line(error)}; make room, then continue with: grass finetune --resume {folder.path}"
        ) from error


def _train_and_evaluate(
    folder: RunFolder, options: FinetuneOptions, config: GrassConfig, run: Prepared, screen: Screen
) -> dict[str, Any]:
    (folder.path / "skipped.jsonl").unlink(missing_ok=True)
    for bad in run.skipped:
        append_row(folder.path / "skipped.jsonl", asdict(bad))
    before = _saved_evaluation(folder, "before")
    if before is None:
        before, _ = evaluate(run, options, screen, "evaluating before training")
        append_row(folder.metrics, {"step": 0, "when": "before", **before})
    if folder.state == "trained":
        run.model, _ = load_model(str(folder.model))
    else:
        if run.layers is not None:
            config = _shorten_probe(config, count_steps(options, len(run.examples)), screen)
            screen.say(
                f"fine-tuning with GRASS, {config.active_layers} of {len(run.layers)} layers at a time"
            )
        train(
            run.model,
            run.encoder.tokenizer,
            run.examples,
            run.heldout,
            options,
            config,
            folder,
            screen,
            chunked=run.chunked,
        )
    training = folder.record["training"]
    after, answers = evaluate(run, options, screen, "evaluating after training")
    (folder.path / "answers.jsonl").unlink(missing_ok=True)
    for answer in answers:
        append_row(folder.path / "answers.jsonl", answer._asdict())
    append_row(folder.metrics, {"step": training["steps"], "when": "after", **after})
    rows = read_rows(folder.layers)
    if rows:
        _draw(rows, training["steps"], config, folder, screen)
    num_params = sum(p.numel() for p in run.model.parameters())
    results = make_results(
        options, config, run.layers, num_params, training, rows, before, after, str(folder.path)
    )
    results |= {"skipped_records": len(run.skipped), "questions_cut": run.questions_cut}
    write_json(folder.results, results)
    folder.update(state="finished")
    return results


def evaluate(
    run: Prepared, options: FinetuneOptions, screen: Screen, title: str
) -> tuple[dict[str, Any], list[Answer]]:
    """Return held-out loss and accuracy, if there are held-out records, and the generated answers."""
    result: dict[str, Any] = {}
    answers: list[Answer] = []
    _to_device(run.model)
    if run.heldout:
        result["heldout_loss"] = heldout_loss(
            run.model, run.heldout, options.eval_batch_size, run.pad_token_id, run.chunked
        )
    if run.questions:
        screen.start(title, len(run.questions), unit="answer")
        answers = answer_questions(
            run.model,
            run.encoder.tokenizer,
            run.questions,
            run.rules,
            options.eval_batch_size,
            options.max_new_tokens,
            run.pad_token_id,
            screen.advance,
        )
        screen.stop()
        result["accuracy"] = sum(answer.correct for answer in answers) / len(answers)
        result["answers"] = len(answers)
        result["scoring"] = count_rules(run.rules, (answer.expected for answer in answers))
    return result, answers


def _shorten_probe(config: GrassConfig, steps: int, screen: Screen) -> GrassConfig:
    shortened = config.for_run(steps)
    if shortened.probe_steps < config.probe_steps and SAMPLER_CLASSES[config.sampler].probes:
        screen.say(
            f"the probe is shortened from {config.probe_steps} to {shortened.probe_steps} of {steps} steps, since it "
            "updates no weights"
        )
    return shortened


def _to_device(model: PreTrainedModel) -> None:
    if torch.cuda.is_available():
        model.to("cuda")  # type: ignore[arg-type]  # transformers annotates `to` with another signature


def _saved_evaluation(folder: RunFolder, when: str) -> dict[str, Any] | None:
    rows = [row for row in read_rows(folder.metrics) if row.get("when") == when]
    return {k: v for k, v in rows[-1].items() if k not in ("step", "when")} if rows else None


def _draw(
    rows: list[dict[str, Any]], steps: int, config: GrassConfig, folder: RunFolder, screen: Screen
) -> None:
    title = f"{folder.path.name}: {config.sampler} sampling, {config.active_layers} layers at a time"
    try:
        draw_picture(rows, steps, title, folder.picture)
    except ImportError:
        screen.say("no plot of the layers: matplotlib is not installed (pip install 'grass-optim[plots]')")
