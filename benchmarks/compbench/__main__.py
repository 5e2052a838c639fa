"""T2I-CompBench and GenEval through ComfyUI: draw the samples, then read what evaluators found.

Prompt files and evaluators are yours to supply. A run that was stopped, whichever way, goes on with
the same command. ``README.md`` tells of one machine, several, Ray and Slurm.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from contextlib import ExitStack
from pathlib import Path

if not __package__:  # run as a folder: python benchmarks/compbench
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from compbench import cluster, results, store
from compbench.plan import FIRST_SEED, Plan, Problem, read_category, setting
from compbench.run import draw
from compbench.server import Server
from compbench.workflow import differences, loras, read_workflow


def options_of(arguments: list[str]) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(prog="compbench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of this run alone")
    parser.add_argument("--check", action="store_true", help="open every picture of a run")
    parser.add_argument("--read", action="store_true", help="the evaluators' results as a table")
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="DIR",
        help="with --read: the run of the plain workflow, to compare with in place of gamma 1",
    )
    what = parser.add_argument_group("what to draw")
    what.add_argument(
        "--prompts",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="T2I-CompBench's *_val.txt, GenEval's evaluation_metadata.jsonl",
    )
    what.add_argument("--workflow", type=Path, metavar="FILE", help="in API form")
    what.add_argument(
        "--gammas",
        type=float,
        nargs="+",
        default=[1.0, 1.2],
        metavar="G",
        help="the settings; 1 is the workflow without TACA (default: 1 1.2)",
    )
    what.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="per prompt; default: the protocol's, 10 (GenEval: 4)",
    )
    what.add_argument(
        "--seed",
        type=int,
        default=FIRST_SEED,
        metavar="N",
        help="of a prompt's first picture (default: 42, the protocol's)",
    )
    for place in ("prompt", "seed", "gamma"):
        what.add_argument(
            f"--{place}-at", metavar="NODE.INPUT", help=f"where the {place} goes, if it is in doubt"
        )
    what.add_argument("--output", metavar="NODE", help="whose picture to take, if in doubt")
    where = parser.add_argument_group("where to draw")
    where.add_argument("--servers", nargs="+", metavar="URL", help="running ComfyUIs")
    where.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="a Ray cluster's ('auto'); without an address, this machine's GPUs",
    )
    where.add_argument("--workers", type=int, metavar="N", help="Ray: how many; default: all GPUs")
    where.add_argument("--gpus-per-worker", type=float, default=1.0, metavar="N")
    where.add_argument(
        "--start",
        metavar="COMMAND",
        help="Ray: starts a ComfyUI; {port} and {folder} are filled in",
    )
    where.add_argument(
        "--patience",
        type=float,
        default=30.0,
        metavar="MINUTES",
        help="for one picture, and for all servers to be away (default: 30)",
    )
    options = parser.parse_args(arguments)
    if options.baseline and not options.read:
        parser.error("--baseline goes with --read")
    if not (options.check or options.read):
        if not (options.prompts and options.workflow):
            parser.error("name the --prompts and the --workflow, or --check or --read a run")
        if bool(options.servers) == (options.ray is not None):
            parser.error("name either --servers or --ray")
        if options.images is not None and options.images < 1:
            parser.error("--images must be at least 1")
        if len(set(options.gammas)) < len(options.gammas):
            parser.error("--gammas has one of them twice")
        if not all(map(math.isfinite, options.gammas)):
            parser.error("--gammas must be numbers")
    return options


def run(options: argparse.Namespace) -> None:
    """Draw what is missing, and say how to have it judged."""
    workflow = read_workflow(
        options.workflow,
        options.prompt_at,
        options.seed_at,
        options.gamma_at,
        options.output,
        plain=options.gammas == [1.0],
    )
    categories = [read_category(file, options.images, options.seed) for file in options.prompts]
    names = [category.name for category in categories]
    if twice := {name for name in names if names.count(name) > 1}:
        raise Problem(f"Two prompt files are both {', '.join(twice)}.")
    plan = Plan(workflow.json(), tuple(options.gammas), tuple(categories))
    patience = 60 * options.patience
    with ExitStack() as stack:
        kept = stack.enter_context(store.opened(options.out, plan))
        total, before = len(plan.units()), len(kept.done)
        print(f"{total} pictures, {before} of them drawn before", flush=True)
        started, again = time.monotonic(), 0
        if before < total:
            if options.servers:
                servers = [Server(url, patience) for url in options.servers]
                painters = list({server.name: server for server in servers}.values())
            else:
                painters = stack.enter_context(
                    cluster.workers(
                        options.ray or None,
                        options.workers,
                        options.gpus_per_worker,
                        options.start,
                        patience,
                    )
                )
            again = draw(plan, workflow, kept, painters, patience)["again"]
    print(
        f"All {total} pictures are there: {total - before} drawn in "
        f"{time.monotonic() - started:.0f} s, {again} tries in vain.\n\nThe evaluators "
        f"(T2I_COMPBENCH and GENEVAL are their checkouts, GENEVAL_DETECTOR a folder):\n"
    )
    print("\n".join(results.commands(options.out, plan)))
    print(f"\nThen: compbench --read --out {options.out}")


def read(out: Path, baseline: Path | None = None) -> None:
    """The evaluators' results, as a table."""
    plan = store.known(out)
    scores, missing = results.read(out, plan)
    notes = []
    if baseline:
        base = store.known(baseline)
        _check_sizes(out, baseline)
        missing += results.add_baseline(scores, plan, baseline, base)
        if beside := differences(plan.workflow, base.workflow):
            notes.append(
                f"The two workflows differ in more than TACA and LoRAs, and so may their "
                f"pictures: {', '.join(beside)}"
            )
    elif nodes := loras(plan.workflow):
        notes.append(
            f"{setting(1)} is with the LoRA of {', '.join(nodes)}, not the plain model; for that, "
            f"draw the workflow without it (--gammas 1) and name the folder with --baseline."
        )
    if scores:
        print("\n\n".join([results.table(scores, plan), *notes]))
    if missing:
        print("\nNot there yet:\n" + "\n".join(missing))
    if not scores:
        raise Problem(
            "No evaluator has been run; the commands:\n" + "\n".join(results.commands(out, plan))
        )


def _check_sizes(out: Path, baseline: Path) -> None:
    """Refuse a baseline whose pictures are larger or smaller."""
    mine, theirs = (store.size_in(folder) for folder in (out, baseline))
    if mine and theirs and mine != theirs:
        raise Problem(
            f"The pictures in {baseline} are {theirs[0]} x {theirs[1]}, those in {out} "
            f"{mine[0]} x {mine[1]}: the two cannot be compared."
        )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    options = options_of(sys.argv[1:] if arguments is None else arguments)
    try:
        if not (options.check or options.read):
            run(options)
        if options.check:
            print(f"All {store.check(options.out)} pictures are whole.")
        if options.read:
            read(options.out, options.baseline)
    except Problem as problem:
        sys.exit(f"compbench: {problem}")


if __name__ == "__main__":
    main()
