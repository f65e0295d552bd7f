"""A fine-tuning run from beginning to end: check, create the run folder, train, evaluate, plot, summarize."""

import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl

import grass
from grass.config import GrassConfig
from grass.errors import RunFolderError, SaveError, first_line
from grass.finetune.demo import demo_model, demo_tokenizer, make_demo, one_thread
from grass.finetune.disk import bytes_needed, check_space
from grass.finetune.evaluation import Answer, answer_questions, heldout_loss
from grass.finetune.loss import use_chunked_loss
from grass.finetune.model import check_method, load_model
from grass.finetune.options import FinetuneOptions, as_tuple
from grass.finetune.picture import draw_losses, draw_picture
from grass.finetune.preparation import NUM_SAMPLES, Prepared, prepare, to_device
from grass.finetune.run_folder import (
    RunFolder,
    append_row,
    check_is_free,
    default_path,
    read_rows,
    write_json,
    write_rows,
)
from grass.finetune.scoring import count_rules
from grass.finetune.screen import Screen
from grass.finetune.stopping import Stopped
from grass.finetune.summary import make_results
from grass.finetune.training import check_loggers, count_steps, train
from grass.sampling import SAMPLER_CLASSES


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
    check_loggers(options)
    prepared = None
    if options.is_demo:
        model = demo_model(demo_tokenizer(), config.seed)
        check_method(model, options, config)
        use_chunked_loss(model, options.loss, screen.say)
    else:
        prepared = prepare(options, config, screen)
        _check_space(path, options, prepared)
    packages = {
        "grass": grass,
        "torch": torch,
        "transformers": transformers,
        "trl": trl,
        "datasets": datasets,
    }
    record = {
        "command": list(command),
        "options": asdict(_with_absolute_paths(options)),
        "config": asdict(config),
        "seed": config.seed,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "data_sha256": {} if prepared is None else prepared.digests,
        "continues_text": prepared is not None and prepared.continues_text,
        "versions": {
            "python": platform.python_version(),
            **{name: package.__version__ for name, package in packages.items()},
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
    prepared = None if options.is_demo else prepare(options, config, screen)
    if prepared is not None and prepared.digests != folder.record["data_sha256"]:
        sources = {"data": options.data, "eval": options.eval}
        changed = [
            ", ".join(as_tuple(sources[name]))
            for name, digest in prepared.digests.items()
            if folder.record["data_sha256"].get(name) != digest
        ]
        raise RunFolderError(
            f"{path}: {'; '.join(changed)} has changed since the run began, so it cannot be continued"
        )
    if prepared is not None and folder.state != "trained":
        _check_space(path, options, prepared)
    return _execute(folder, options, config, prepared, screen)


def _with_absolute_paths(options: FinetuneOptions) -> FinetuneOptions:
    """Return the options with which a run can be continued from any folder; a name on the hub stays one."""
    return replace(
        options,
        model=_absolute(options.model),
        data=tuple(map(_absolute, as_tuple(options.data))),
        eval=tuple(map(_absolute, as_tuple(options.eval))),
        output=os.path.abspath(options.output) if options.output else "",
    )


def _absolute(path: str) -> str:
    return os.path.abspath(path) if os.path.exists(path) else path


def _check_space(path: Path, options: FinetuneOptions, prepared: Prepared) -> None:
    steps = count_steps(options, len(prepared.dataset))
    check_space(
        path,
        bytes_needed(prepared.model, options.save_steps, steps, options.save_total_limit + options.load_best),
    )


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
        before, answers = evaluate(run, options, screen, "before training")
        write_rows(folder.answers, ({"when": "before", **answer._asdict()} for answer in answers))
        append_row(folder.metrics, {"step": 0, "when": "before", **before})
    if folder.state == "trained":
        run.model, _ = load_model(str(folder.model), trust_remote_code=options.trust_remote_code)
    else:
        if run.layers is not None:
            config = _shorten_probe(config, count_steps(options, len(run.dataset)), screen)
            screen.say(
                f"fine-tuning with GRASS, {config.active_layers} of {len(run.layers)} layers at a time"
            )
        tokenizer, chunked = run.encoder.tokenizer, run.chunked
        train(
            run.model, tokenizer, run.dataset, run.heldout, options, config, folder, screen, chunked=chunked
        )
    training = folder.record["training"]
    after, answers = evaluate(run, options, screen, "after training")
    answers_before = [row for row in read_rows(folder.answers) if row["when"] == "before"]
    write_rows(
        folder.answers, [*answers_before, *({"when": "after", **answer._asdict()} for answer in answers)]
    )
    append_row(folder.metrics, {"step": training["steps"], "when": "after", **after})
    rows = read_rows(folder.layers)
    _draw(rows, training["steps"], config, folder, screen)
    num_params = sum(p.numel() for p in run.model.parameters())
    results = make_results(
        options, config, run.layers, num_params, training, rows, before, after, str(folder.path)
    )
    results |= {
        "skipped_records": len(run.skipped),
        "questions_cut": run.questions_cut,
        "samples": samples(read_rows(folder.answers)),
    }
    write_json(folder.results, results)
    folder.update(state="finished")
    return results


def evaluate(
    run: Prepared, options: FinetuneOptions, screen: Screen, title: str
) -> tuple[dict[str, Any], list[Answer]]:
    """Return held-out loss and accuracy, if there are held-out records, and the generated answers."""
    result: dict[str, Any] = {}
    answers: list[Answer] = []
    to_device(run.model)
    if run.heldout:
        screen.start(f"held-out loss {title}", len(run.heldout), unit="text", delay=2.0)
        result["heldout_loss"] = heldout_loss(
            run.model, run.heldout, options.eval_batch_size, run.pad_token_id, run.chunked, screen.advance
        )
        screen.stop()
    if run.questions:
        screen.start(f"answers {title}", len(run.questions), unit="answer")
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
    if answers and run.rules:
        result["accuracy"] = sum(bool(answer.correct) for answer in answers) / len(answers)
        result["answers"] = len(answers)
        by_source: dict[str, list[bool]] = {}
        for answer in answers:
            by_source.setdefault(answer.source, []).append(bool(answer.correct))
        if len(by_source) > 1:
            result["accuracy_by_source"] = {name: sum(c) / len(c) for name, c in by_source.items()}
        result["scoring"] = count_rules(run.rules, (answer.expected for answer in answers))
    return result, answers


def samples(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the first questions of a run with the texts generated before and after training.

    Args:
        rows: rows of answers.jsonl.
    """
    before, after = ([row for row in rows if row["when"] == when] for when in ("before", "after"))
    pairs = list(zip(before, after, strict=False))[:NUM_SAMPLES]
    return [
        {
            "question": a["question"],
            "expected": a["expected"],
            "before": b["generated"],
            "after": a["generated"],
        }
        for b, a in pairs
    ]


def _shorten_probe(config: GrassConfig, steps: int, screen: Screen) -> GrassConfig:
    shortened = config.for_run(steps)
    if shortened.probe_steps < config.probe_steps and SAMPLER_CLASSES[config.sampler].probes:
        screen.say(
            f"the probe is shortened from {config.probe_steps} to {shortened.probe_steps} of {steps} steps, since it "
            "updates no weights"
        )
    return shortened


def _saved_evaluation(folder: RunFolder, when: str) -> dict[str, Any] | None:
    rows = [row for row in read_rows(folder.metrics) if row.get("when") == when]
    return {k: v for k, v in rows[-1].items() if k not in ("step", "when")} if rows else None


def _draw(
    rows: list[dict[str, Any]], steps: int, config: GrassConfig, folder: RunFolder, screen: Screen
) -> None:
    """Draw the losses and, if there are rows of layers, the layers."""
    name = folder.path.name
    try:
        draw_losses(read_rows(folder.metrics), folder.path / "loss.png", name)
        if rows:
            title = f"{name}: {config.sampler} sampling, {config.active_layers} layers at a time"
            draw_picture(rows, steps, title, folder.picture)
    except ImportError:
        screen.say("no pictures: matplotlib is not installed (pip install 'grass-optim[plots]')")
