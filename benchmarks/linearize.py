"""How much of a softmax byte model's gain a linear one recovers with a tenth of the training tokens.

The model is a ``SequenceModel`` with softmax attention, two layers of width 96, trained on ``stdlib-bytes``. The gain
is that over the best guess that ignores context, in bits a byte on the test split. Tokens of mimicry count like those
of fine-tuning. Learning rates and the window were chosen on seed 100, outside what is reported.

Run: ``OMP_NUM_THREADS=1 python benchmarks/linearize.py`` (about ten minutes on one core); a second run goes on where
the first was stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import torchgraft
from torchgraft.bench.files import write_atomic
from torchgraft.bench.task import Task
from torchgraft.bench.tasks import load_task
from torchgraft.bench.tasks.stdlib_bytes import unigram_bits
from torchgraft.claims.sequences import bits_per_byte, train_mixer

RESULT = Path(__file__).parents[1] / "results" / "linearize.json"
WIDTH, LAYERS, STEPS, BATCH, CONTEXT = 96, 2, 1000, 8, 128
#: Samples a step of the recovery, and how many steps a tenth of the tokens are.
SMALL = 4
TENTH = STEPS * BATCH // (10 * SMALL)
WINDOW = {"act": "exp", "window": 16}
MIMIC = TENTH // 4
#: name -> what ``linearize`` is called with.
WAYS: dict[str, dict[str, Any]] = {
    "hedgehog, as in the paper": {
        "to": "hedgehog",
        "options": {"act": "exp"},
        "mimic_steps": MIMIC,
        "mimic_lr": 5e-2,
        "steps": TENTH - MIMIC,
        "lr": 4e-3,
    },
    "hedgehog, window 16": {
        "to": "hedgehog",
        "options": WINDOW,
        "mimic_steps": MIMIC,
        "mimic_lr": 3e-2,
        "steps": TENTH - MIMIC,
        "lr": 1e-3,
    },
    "liger, low rank as in the paper": {"to": "liger", "steps": TENTH, "lr": 5e-3},
    "liger, all parameters": {"to": "liger", "steps": TENTH, "lr": 1e-3, "tune": "all"},
    "lit (causal)": {"to": "lit", "steps": TENTH, "lr": 3e-3},
}


def one_seed(task: Task, seed: int, console: Console) -> dict[str, float]:
    """Return bits a byte of the softmax model and of each conversion."""
    begun = time.perf_counter()
    softmax = train_mixer(
        task, "softmax-attention", steps=STEPS, d_model=WIDTH, layers=LAYERS, batch_size=BATCH, seed=seed
    )
    found = {"softmax": bits_per_byte(softmax, task)}
    console.print(f"seed {seed}: softmax {found['softmax']:.3f} in {time.perf_counter() - begun:.0f} s")
    for name, way in WAYS.items():
        begun = time.perf_counter()
        linear = torchgraft.linearize(softmax, task=task, batch_size=SMALL, seed=seed, **way)
        found[name] = bits_per_byte(linear, task)
        console.print(f"seed {seed}: {name} {found[name]:.3f} in {time.perf_counter() - begun:.0f} s")
    return found


def main() -> None:
    """Measure what is missing, write the result, and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args().seeds
    torch.set_num_threads(1)
    record: dict[str, Any] = {}
    console, task = Console(), load_task("stdlib-bytes")
    settings = {"width": WIDTH, "layers": LAYERS, "steps": STEPS, "batch": BATCH, "context": CONTEXT, "ways": WAYS}
    kept = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    bits = kept.get("bits", {}) if kept.get("settings") == settings else {}
    unigram = unigram_bits(task.train, task.test)
    for seed in chosen:
        if str(seed) not in bits:
            bits[str(seed)] = one_seed(task, seed, console)
        shares = {
            name: [(unigram - each[name]) / (unigram - each["softmax"]) for each in bits.values()] for name in WAYS
        }
        record = {
            "settings": settings,
            "tokens": {"softmax": STEPS * BATCH * CONTEXT, "recovery": TENTH * SMALL * CONTEXT},
            "unigram": unigram,
            "bits": bits,
            "recovered": {
                name: {"mean": fmean(values), "least": min(values), "most": max(values), "held": fmean(values) >= 0.97}
                for name, values in shares.items()
            },
            "machine": f"{platform.machine()}, {platform.system()}",
            "torch": torch.__version__,
        }
        write_atomic(RESULT, json.dumps(record, indent=1) + "\n")
    table = Table("way", "bits a byte", "gain recovered", "least", "97 %")
    for name, row in record["recovered"].items():
        mean = fmean(each[name] for each in bits.values())
        held = "held" if row["held"] else "not held"
        table.add_row(name, f"{mean:.3f}", f"{row['mean']:.1%}", f"{row['least']:.1%}", held)
    console.print(table)


if __name__ == "__main__":
    main()
