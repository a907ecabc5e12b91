"""`pilothouse demo`: make the demo model and its profiles again, and measure them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

SUMMARY = "retrain the demo model, refit its profiles, or print its table"


def register(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    build = verbs.add_parser("build", help="train the demo model (about 15 minutes on 2 cores)")
    build.add_argument("--out", type=Path, help="directory; default: where `serve` looks")
    build.add_argument("--seed", type=int, default=0)
    build.add_argument("--steps", type=int, help="training steps; fewer only to try it out")
    build.add_argument("--threads", type=int, default=2, help="CPU threads; weights depend on it")
    fit = verbs.add_parser("fit", help="fit the demo's profiles and monitor (some minutes)")
    fit.add_argument("--model", type=Path, help="a demo model; default: where `serve` looks")
    fit.add_argument("--out", type=Path, help="directory; default: where `serve` looks")
    fit.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    table = verbs.add_parser("table", help="measure every profile on held-out prompts")
    table.add_argument("--per-kind", type=int, default=400, help="test prompts per class")
    table.add_argument("--threads", type=int, default=2, help="CPU threads of torch")


def run(arguments: argparse.Namespace) -> int:
    return {"build": _build, "fit": _fit, "table": _table}[arguments.verb](arguments)


def _build(arguments: argparse.Namespace) -> int:
    from steering.demo import DEMO, recipe

    out = arguments.out or DEMO / "model"
    recipe.build(out, seed=arguments.seed, steps=arguments.steps, threads=arguments.threads)
    print(f"The demo model is in {out}")
    return 0


def _fit(arguments: argparse.Namespace) -> int:
    import torch

    from steering.demo import DEMO
    from steering.demo.fit import fit_demo

    torch.set_num_threads(arguments.threads)
    out = arguments.out or DEMO / "profiles"
    fit_demo(
        arguments.model or DEMO / "model",
        out,
        report=lambda line: print(line, file=sys.stderr, flush=True),
        progress=sys.stderr.isatty(),
    )
    print(f"The demo's profiles are in {out}")
    return 0


def _table(arguments: argparse.Namespace) -> int:
    from server.hosting import open_host
    from server.settings import load_settings
    from steering.demo.table import render

    host = open_host(load_settings({"model": None, "threads": arguments.threads}))
    for line in render(host.lm, list(host.profiles), per_kind=arguments.per_kind):
        print(line, flush=True)
    return 0
