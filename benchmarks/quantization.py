"""Int8 after weight excitation: small networks, quantized after training and trained for it.

    python benchmarks/quantization.py run      # about 15 minutes of one core
    python benchmarks/quantization.py report   # the tables of docs/quantization.md anew

Each finished run is a line of `results/quantization.jsonl`; a command that was stopped goes on
where it was. torchao's schemes are measured where it is installed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lines import RESULTS, Lines
from quantization_runs import ARMS, CASES, SEEDS, Run, perform


def main() -> None:
    """Runs what is missing, or writes the report."""
    options = _options()
    if options.command == "report":
        from quantization_report import write_report

        write_report(options.output)
        return
    lines = Lines(options.output / "quantization.jsonl")
    runs = [
        Run(case, arm, seed) for seed in options.seeds for case in options.cases for arm in ARMS
    ]
    with lines.locked():
        lines.add_missing(runs, perform, "quantization", options.jobs)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the lines are")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("report", help="write the tables from the lines")
    run = commands.add_parser("run", help="run whatever is missing")
    run.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    run.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    run.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    return parser.parse_args()


if __name__ == "__main__":
    main()
