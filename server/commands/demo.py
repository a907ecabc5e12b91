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
    fit.add_argument(
        "--baselines",
        nargs="*",
        metavar="NAME",
        help="fit what the profiles are compared with instead; all, or these (resumes)",
    )
    fit.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    table = verbs.add_parser("table", help="measure every profile on held-out prompts")
    table.add_argument("--per-kind", type=int, default=400, help="test prompts per class")
    table.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    study = verbs.add_parser(
        "study", help="measure methods and baselines, AlphaSteer's gate, PCA-OT by depth, LLM-VA"
    )
    study.add_argument("--per-kind", type=int, default=400, help="test prompts per class")
    study.add_argument("--threads", type=int, default=2, help="CPU threads of torch")


def run(arguments: argparse.Namespace) -> int:
    return {"build": _build, "fit": _fit, "table": _table, "study": _study}[arguments.verb](
        arguments
    )


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
    if arguments.baselines is not None:
        return _fit_baselines(arguments)
    out = arguments.out or DEMO / "profiles"
    fit_demo(
        arguments.model or DEMO / "model",
        out,
        report=_report,
        progress=sys.stderr.isatty(),
    )
    print(f"The demo's profiles are in {out}")
    return 0


def _fit_baselines(arguments: argparse.Namespace) -> int:
    from server.engine.offline import OfflineGenerator
    from steering.demo import DEMO
    from steering.demo.fit import BASELINES, fit_baselines

    names = arguments.baselines or list(BASELINES)
    if unknown := sorted(set(names) - set(BASELINES)):
        raise ValueError(f"no baseline {unknown[0]!r}; there are {', '.join(BASELINES)}")
    out = arguments.out or DEMO / "baselines"
    with OfflineGenerator() as generator:
        fit_baselines(
            arguments.model or DEMO / "model",
            out,
            names,
            generator=generator,
            report=_report,
            progress=sys.stderr.isatty(),
        )
    print(f"The baselines are in {out}")
    return 0


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _table(arguments: argparse.Namespace) -> int:
    from server.hosting import open_host
    from server.settings import load_settings
    from steering.demo.table import render

    host = open_host(load_settings({"model": None, "threads": arguments.threads}))
    for line in render(host.lm, list(host.profiles), per_kind=arguments.per_kind):
        print(line, flush=True)
    return 0


def _study(arguments: argparse.Namespace) -> int:
    from server.hosting import open_host
    from server.settings import load_settings
    from steering.demo import DEMO
    from steering.demo.study import render

    host = open_host(
        load_settings(
            {"model": None, "threads": arguments.threads, "profile": [DEMO / "baselines"]}
        )
    )
    profiles = {profile.name: profile for profile in host.profiles}
    for line in render(host.lm, profiles, per_kind=arguments.per_kind):
        print(line, flush=True)
    return 0
