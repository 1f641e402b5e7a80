"""Does it help? Paired training runs of small networks, by a fixed protocol.

    python benchmarks/evidence.py run resnet_bn --jobs 2      # tuning, then the counted pairs
    python benchmarks/evidence.py run mixer --arms plain mwe  # some arms
    python benchmarks/evidence.py report                      # tables and figures anew

`evidence_protocol.md` says what is run and how it is judged. Each finished run is a line of
`results/evidence_NETWORK.jsonl`; a command that was stopped goes on where it was. `report` writes
the figures and a section of `docs/does_it_help.md`. To repeat a row of its tables, give the
network, `--arms plain ARM` and `--output FOLDER`: the settings are those that the committed tuning
chose.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import evidence_data
from evidence_arms import COUNTED, EXPERIMENTS, TUNING
from evidence_lines import choose
from evidence_training import Run, perform
from lines import RESULTS, Lines


def main() -> None:
    """Runs what is missing, or writes the report."""
    options = _options()
    if options.command == "report":
        from evidence_report import write_report

        write_report(RESULTS)
        return
    if not all(EXPERIMENTS[network].signals for network in options.networks):
        evidence_data.load(options.data)  # an early word if it is absent
    for network in options.networks:
        run_network(network, options)


def run_network(network: str, options: argparse.Namespace) -> None:
    """Tunes the arms that are not tuned, then runs the pairs."""
    lines = Lines(options.output / f"evidence_{network}.jsonl")
    committed = Lines(RESULTS / f"evidence_{network}.jsonl")
    with lines.locked():
        arms = options.arms or list(EXPERIMENTS[network].arms)
        known = lines.rows() + committed.rows()
        tuned = choose(known, network)
        tuning = tuning_runs(network, [arm for arm in arms if arm not in tuned])
        _perform(tuning, lines, options)
        if options.phase == "tune":
            return
        tuned = choose(lines.rows() + committed.rows(), network)
        _perform(counted_runs(network, arms, options.seeds, tuned), lines, options)


def tuning_runs(network: str, arms: list[str]) -> list[Run]:
    """Every setting of every arm for each tuning seed."""
    return [
        Run(network, "tune", arm, seed, lr, decay)
        for seed in TUNING
        for arm in arms
        for lr, decay in EXPERIMENTS[network].settings(arm)
    ]


def counted_runs(
    network: str, arms: list[str], seeds: list[int], tuned: dict[str, tuple[float, float]]
) -> list[Run]:
    """Pair after pair, so that all arms of a seed are done before the next begins."""
    return [Run(network, "count", arm, seed, *tuned[arm]) for seed in seeds for arm in arms]


def _perform(runs: list[Run], lines: Lines, options: argparse.Namespace) -> None:
    label = f"{runs[0].network}, {runs[0].phase}" if runs else ""
    lines.add_missing(runs, partial(perform, folder=options.data), label, options.jobs)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("report", help="write tables and figures from the lines")
    run = commands.add_parser("run", help="run whatever is missing")
    run.add_argument("networks", nargs="+", choices=list(EXPERIMENTS))
    run.add_argument("--arms", nargs="+", help="all of the network by default")
    run.add_argument("--phase", choices=["all", "tune"], default="all")
    run.add_argument("--seeds", nargs="+", type=int, default=list(COUNTED))
    run.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    run.add_argument("--data", type=Path, default=evidence_data.FOLDER, help="IDX files")
    run.add_argument("--output", type=Path, default=RESULTS, help="where the lines go")
    return parser.parse_args()


if __name__ == "__main__":
    main()
