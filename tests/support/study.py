"""Rows of both studies of bench/quality, made up."""

import json
import random
from dataclasses import asdict

from bench.quality import real
from bench.quality.comparison import Found, compare
from bench.quality.study import BUDGETS, SEARCH, STUDY
from grass.finetune.run_folder import write_rows
from grass.reproduce.job import digest_of, settings_of
from grass.reproduce.options import SEARCH_SEED
from grass.reproduce.study import Job

PART = STUDY.parts["key"]
BEST = SEARCH.rates[1]


def row(job, log_loss, **changes):
    values = {
        "base_digest": f"digest {job.base}",
        "log_loss": log_loss,
        "exact": 0.5,
        "curve": [2.0, 1.5, 1.2, 1.0, 0.9, 0.8, 0.7, 0.65, 0.6, 0.55],
        "trained_share": 0.25,
        "longest_wait": 30,
        "layers": [0.25] * 8,
        "processor_seconds": 20.0,
    }
    return asdict(job) | asdict(BUDGETS[job.task]) | values | changes


def rows_of(method, shift, noise=0.0, part=PART):
    """Rows of a method whose log-loss is 0.5, a term of the pair, and a shift."""
    rng = random.Random(method)
    found = [
        row(Job(part.task, method, lr, base, order), 1.0 + (lr != BEST), exact=0.5 - 0.1 * (lr != BEST))
        for lr in SEARCH.rates
        for base in part.bases
        for order in SEARCH.orders
    ]
    for base, order in part.pairs:
        of_pair = random.Random(100 * base + order).gauss(0, 0.05)
        loss = 0.5 + of_pair + shift + rng.gauss(0, noise)
        found.append(row(Job(part.task, method, BEST, base, order), loss, exact=0.6 - shift))
    return found


def one(rows, method, other):
    return compare(rows, PART, [(method, other)]).get((method, other))


def found_in(rows, folder):
    write_rows(folder / "study.jsonl", rows)
    return Found.of(folder)


def write_real(folder, table, losses):
    """Rows of study B and their settings: a search, and a result for each log-loss of a method."""
    options = real.options_for(table, "SmolLM2", "data", "", 1, 1.0)
    settings = settings_of(options, real.CONFIG, "weights", {"train": "records"})
    rows = []
    for method, of in losses.items():
        job = {"task": table, "method": method, "base": "SmolLM2", "settings": digest_of(settings)}
        job |= {"lr": 2e-4, "num_examples": 677, "seconds": 600.0}
        for lr in (1e-4, 2e-4, 4e-4):
            rows.append(job | {"lr": lr, "order": SEARCH_SEED, "log_loss": 1.0 + (lr != 2e-4)})
        for order, loss in enumerate(of):
            accuracies = dict.fromkeys(real.TASKS[table], 0.75 - loss)
            rows.append(job | {"order": order, "log_loss": loss, "accuracies": accuracies})
    write_rows(folder / f"{table}.jsonl", rows)
    (folder / f"{table}.settings.json").write_text(json.dumps(settings))
