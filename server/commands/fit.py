"""`pilothouse fit`: fit a method, or the monitor, to a model.

Replies and states are kept in `OUT/.cache`, so that an interrupted fit goes on where it stopped,
and fits of other methods on the same prompts share them.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

from server.commands import prompt_flags, template_flags

SUMMARY = "fit a method to a model and save the profile, or fit the model's monitor"

FIT_SHARE = 0.7
"""Of the prompts; methods choose their hyper-parameters on the others."""

MONITOR = "monitor"


def register(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("method", help=f"a method of steering.methods, as llm_va; or {MONITOR}")
    parser.add_argument("--model", required=True, help="directory or hub id of the model")
    parser.add_argument("--revision", help="revision of a model from the hub")
    prompt_flags.register(parser)
    template_flags.register(parser)
    parser.add_argument("--out", required=True, type=Path, help="directory for the profile")
    parser.add_argument("--name", help="of the profile; default: the method's")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a hyper-parameter of the method; may be repeated",
    )
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        type=Path,
        metavar="PATH",
        help=f"with {MONITOR}: a profile file, or a directory of them, to calibrate an answer "
        "probe for; may be repeated",
    )
    parser.add_argument(
        "--judge",
        default="phrases",
        metavar="SPEC",
        help="what judges replies: phrases (default), hf:ID or hf:FORMAT=ID of a classifier",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the splits and the method")
    parser.add_argument(
        "--reply-tokens", type=int, default=128, help="of each judged reply (default: 128)"
    )
    parser.add_argument(
        "--max-num-seqs", type=int, default=32, help="prompts answered at once (default: 32)"
    )
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")


def run(arguments: argparse.Namespace) -> int:
    import torch

    from server.engine.offline import OfflineGenerator
    from server.profiles import profile_files
    from steering.fit import fit_profile, make_method
    from steering.judge import make_judge
    from steering.methods import FitData
    from steering.models import load_model
    from steering.monitor import MONITOR_FILE
    from steering.monitor_card import table
    from steering.monitor_fit import fit_monitor
    from steering.profile import Profile
    from steering.resume import CACHE, keep_in

    # Everything that can be wrong with the arguments shows before the model is loaded.
    _check(arguments)
    settings = _hyper_parameters(arguments.set)
    method = None if arguments.method == MONITOR else make_method(arguments.method, settings)
    profiles = [Profile.load(f) for path in arguments.profile for f in profile_files(path)]
    fit, selection = prompt_flags.load(arguments, _report).split(FIT_SHARE, arguments.seed)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    judge = make_judge(arguments.judge, device=arguments.device)
    lm = load_model(arguments.model, device=arguments.device, revision=arguments.revision)
    lm = template_flags.apply(lm, arguments)
    for profile in profiles:
        profile.check_base(lm)
    cache = arguments.out / CACHE
    with OfflineGenerator(max_num_seqs=arguments.max_num_seqs) as generator:
        data = FitData(
            lm,
            fit,
            selection,
            generator=generator,
            judge=judge,
            reply_tokens=arguments.reply_tokens,
            seed=arguments.seed,
            progress=sys.stderr.isatty(),
            report=_report,
        )
        data = keep_in(cache, data)
        if method is None:
            monitor = fit_monitor(data, profiles)
            print("\n".join(table(monitor)))
            path = monitor.save(arguments.out / MONITOR_FILE)
            advice = f"serve it with --monitor {path}, or beside the profiles"
        else:
            made = fit_profile(method, data, name=arguments.name)
            path = made.save(arguments.out / f"{made.name}.safetensors")
            advice = f"serve it with `pilothouse serve --model {arguments.model} --profile {path}`"
    if cache.is_dir():
        _report(f"{cache} holds {_size(cache) / 2**20:.1f} MiB for further fits; delete it at will")
    print(f"{path}: {advice}")
    return 0


def _size(folder: Path) -> int:
    """Bytes of all files in it, as far as they stay: other fits may be at work there."""
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += file.stat().st_size
    return total


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for flags that contradict each other or cannot be; makes the directory."""
    from steering.profile import check_name

    template_flags.check(arguments)
    if arguments.method == MONITOR:
        for flag, value in (("--set", arguments.set), ("--name", arguments.name)):
            if value:
                raise ValueError(f"{flag} belongs to a method's profile; the monitor has none")
    elif arguments.profile:
        raise ValueError(f"--profile belongs to `pilothouse fit {MONITOR}`")
    if arguments.name is not None:
        check_name(arguments.name)
    for flag, least in (("reply_tokens", 1), ("max_num_seqs", 1), ("threads", 1), ("seed", 0)):
        value = getattr(arguments, flag)
        if value is not None and value < least:
            raise ValueError(f"--{flag.replace('_', '-')} is at least {least}")
    # A folder that cannot be written to should not show after hours.
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=arguments.out).close()
    except OSError as error:
        raise ValueError(f"--out {arguments.out} cannot be written to: {error}") from error


def _hyper_parameters(pairs: list[str]) -> dict[str, str]:
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set {pair}: write --set KEY=VALUE")
        settings[key] = value
    return settings
