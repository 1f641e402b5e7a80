"""Does it help? Paired runs of small networks, with and without weight excitation.

    python benchmarks/evidence.py digits        # about half an hour of one core
    python benchmarks/evidence.py strokes       # about an hour of one core a condition
    python benchmarks/evidence.py strokes --conditions 'SGD, 0.05' --seeds 3
    python benchmarks/evidence.py --report      # only write the tables and curves anew

A pair has the same initial weights, batches and noise; methods differ by their surgery alone.
What a run is: `evidence_tasks.py` and `evidence_methods.py`. Each finished run is a line of
`results/evidence.jsonl`, and a command that was stopped goes on where it was. Writes
`results/evidence.md` and a picture of learning curves for each task.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from evidence_methods import CONDITIONS, build
from evidence_report import write_report
from evidence_tasks import Task, make_task
from rich.progress import track

RESULTS = Path(__file__).parent / "results"
RUNS = RESULTS / "evidence.jsonl"
WIDTHS = {"digits": 16, "strokes": 8}
_CURVE_POINTS = 10


def main() -> None:
    """Runs what was asked for and writes the report."""
    options = _options()
    torch.set_num_threads(1)
    rows = read_rows(options.runs)
    if not options.report:
        for name in options.tasks or list(WIDTHS):
            run_missing(name, options, rows)
    write_report(list(rows.values()), RESULTS)


def run_missing(name: str, options: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> None:
    """Runs whatever of a task is not in ``rows``, and adds it."""
    wanted = [
        (condition, method, seed)
        for condition in options.conditions or CONDITIONS
        for seed in range(options.seeds)
        for method in CONDITIONS[condition].methods
    ]
    missing = [run for run in wanted if _key(name, *run) not in rows]
    if not missing:
        return
    task = make_task(name)
    options.runs.parent.mkdir(exist_ok=True)
    for condition, method, seed in track(missing, description=name):
        row = train(task, condition, method, seed)
        rows[_key(name, condition, method, seed)] = row
        with options.runs.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def train(task: Task, condition: str, method: str, seed: int) -> dict[str, Any]:
    """One run: test accuracy in percent at ten places of training, and CPU seconds of it."""
    settings = CONDITIONS[condition]
    model = build(method, settings, task.classes, WIDTHS[task.name], seed)
    optimizer = settings.make_optimizer(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps)
    places = {round(task.steps * (n + 1) / _CURVE_POINTS) for n in range(_CURVE_POINTS)}
    curve, spent = [], 0.0
    for step, (images, labels) in enumerate(task.batches(seed), start=1):
        start = time.process_time()
        model.train()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        spent += time.process_time() - start
        if step in places:
            curve.append(accuracy(model, task))
    return {
        "task": task.name,
        "condition": condition,
        "method": method,
        "seed": seed,
        "accuracy": curve[-1],
        "curve": curve,
        "cpu_seconds": round(spent, 2),
    }


@torch.no_grad()
def accuracy(model: torch.nn.Module, task: Task) -> float:
    """Test accuracy in percent."""
    model.eval()
    hits = [
        (model(images).argmax(1) == labels).sum()
        for images, labels in zip(
            task.test_images.split(1000), task.test_labels.split(1000), strict=True
        )
    ]
    return round(100 * torch.stack(hits).sum().item() / len(task.test_labels), 3)


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Finished runs by what they were."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {_key(r["task"], r["condition"], r["method"], r["seed"]): r for r in rows}


def _key(task: str, condition: str, method: str, seed: int) -> str:
    return f"{task} | {condition} | {method} | {seed}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("tasks", nargs="*", choices=[*WIDTHS, []], help="all by default")
    parser.add_argument("--conditions", nargs="*", choices=list(CONDITIONS), help="all by default")
    parser.add_argument("--seeds", type=int, default=10, help="pairs of each comparison (10)")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where finished runs go")
    return parser.parse_args()


if __name__ == "__main__":
    main()
