"""T2I-CompBench and GenEval through ComfyUI: draw the samples, then read what evaluators found.

A run that was stopped, whichever way, goes on with the same command. ``README.md`` has the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from contextlib import nullcontext
from pathlib import Path

if not __package__:  # run as a folder: python benchmarks/compbench
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from compbench import judging, ray_workers, results
from compbench.draw import Drawing, Server
from compbench.plan import FIRST_SEED, Plan, Problem, read_category
from compbench.workflow import read_workflow


def options_of(arguments: list[str]) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(prog="compbench", description=__doc__, allow_abbrev=False)
    what, where = (parser.add_argument_group(f"{w} to draw") for w in ("what", "where"))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of this run alone")
    parser.add_argument("--check", action="store_true", help="open every picture of a run")
    parser.add_argument("--read", action="store_true", help="the evaluators' results as a table")
    text = (
        "have a drawn run judged by TACA Prompt Check, which is not the benchmarks' own evaluator"
    )
    parser.add_argument("--judge", choices=["prompt-check"], help=text)
    text = "with --judge: a text encoder that sees pictures, Qwen2.5-VL or Qwen3-VL"
    parser.add_argument("--encoder", type=Path, metavar="FILE", help=text)
    text = "with --judge: its type in Load CLIP (default: qwen_image)"
    parser.add_argument("--encoder-type", default="qwen_image", metavar="TYPE", help=text)
    text = "with --read: the run of the plain workflow, to compare with in place of gamma 1"
    parser.add_argument("--baseline", type=Path, metavar="DIR", help=text)
    text = "T2I-CompBench's *_val.txt, GenEval's evaluation_metadata.jsonl, GenEval 2's data"
    what.add_argument("--prompts", type=Path, nargs="+", metavar="FILE", help=text)
    what.add_argument("--workflow", type=Path, metavar="FILE", help="in API form")
    text = "the settings; 1 is the workflow without TACA (default: 1 1.2)"
    what.add_argument("--gammas", type=float, nargs="+", default=[1.0, 1.2], metavar="G", help=text)
    what.add_argument("--images", type=int, metavar="N", help="per prompt; default: 10, GenEval 4")
    text = "of a prompt's first picture (default: 42, the protocol's)"
    what.add_argument("--seed", type=int, default=FIRST_SEED, metavar="N", help=text)
    for place in ("prompt", "seed", "gamma"):
        text = f"where the {place} goes, if it is in doubt"
        what.add_argument(f"--{place}-at", metavar="NODE.INPUT", help=text)
    what.add_argument("--output", metavar="NODE", help="whose picture to take, if in doubt")
    where.add_argument("--servers", nargs="+", metavar="URL", help="running ComfyUIs")
    text = "a Ray cluster's ('auto'); without an address, this machine's GPUs"
    where.add_argument("--ray", nargs="?", const="", metavar="ADDRESS", help=text)
    where.add_argument("--workers", type=int, metavar="N", help="Ray: how many; default: all GPUs")
    where.add_argument("--gpus-per-worker", type=float, default=1.0, metavar="N")
    text = "Ray: starts a ComfyUI; {port} and {folder} are filled in"
    where.add_argument("--start", metavar="COMMAND", help=text)
    text = "for one picture, and for all servers to be away (default: 30)"
    where.add_argument("--patience", type=float, default=30.0, metavar="MINUTES", help=text)
    options = parser.parse_args(arguments)
    options.is_drawing = not (options.check or options.read or options.judge)
    if options.baseline and not options.read:
        parser.error("--baseline goes with --read")
    if bool(options.judge) != bool(options.encoder):
        parser.error("--judge and --encoder go together")
    if options.is_drawing and not (options.prompts and options.workflow):
        parser.error("name the --prompts and the --workflow, or --check, --judge or --read a run")
    if options.is_drawing and bool(options.servers) == (options.ray is not None):
        parser.error("name either --servers or --ray")
    if options.images is not None and options.images < 1:
        parser.error("--images must be at least 1")
    if len(set(options.gammas)) < len(options.gammas):
        parser.error("--gammas has one of them twice")
    if not all(map(math.isfinite, options.gammas)):
        parser.error("--gammas must be numbers")
    return options


def draw(options: argparse.Namespace) -> None:
    """Draw what is missing, and say how to have it judged."""
    places = options.prompt_at, options.seed_at, options.gamma_at, options.output
    workflow = read_workflow(options.workflow, *places, is_plain=options.gammas == [1.0])
    categories = [read_category(file, options.images, options.seed) for file in options.prompts]
    if len({category.name for category in categories}) < len(categories):
        raise Problem("Two prompt files are of one category.")
    plan = Plan(workflow, options.gammas, categories)
    todo, total = plan.begin(options.out), len(plan.units())
    print(f"{total} pictures, {total - len(todo)} of them drawn before", flush=True)
    if todo:
        patience = 60 * options.patience
        servers = [Server(url, patience=patience) for url in options.servers or ()]
        how = options.ray or None, options.workers, options.gpus_per_worker, options.start, patience
        with nullcontext(servers) if servers else ray_workers.workers(*how) as drawing:
            try:
                vain = asyncio.run(Drawing(options.out, plan, todo, drawing).run(patience))
            except (Problem, OSError, KeyboardInterrupt) as stop:
                why = str(stop) or "Stopped."
                raise Problem(f"{why} What was drawn is kept: the same command goes on.") from stop
            print(f"{len(todo)} drawn, {vain} tries in vain")
    print(f"All {total} pictures are there. The evaluators (T2I_COMPBENCH and GENEVAL are their")
    print("checkouts, GENEVAL_DETECTOR a folder):\n")
    print("\n".join([*results.commands(options.out, plan), "\nThen: --read --out alone."]))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    options = options_of(sys.argv[1:] if arguments is None else arguments)
    try:
        if options.is_drawing:
            draw(options)
        if options.check:
            if missing := Plan.read(options.out).missing(options.out):
                why = f"{len(missing)} pictures are missing or damaged: {missing[0].path} ..."
                raise Problem(f"{why} The command that drew them draws these again.")
            print("All pictures are whole.")
        if options.judge:
            judging.judge(options.out, options.encoder, options.encoder_type)
        if options.read:
            print(results.report(options.out, options.baseline))
    except Problem as problem:
        sys.exit(f"compbench: {problem}")


if __name__ == "__main__":
    main()
