"""`pilothouse eval`: compare profiles on prompts, and write a report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.commands import template_flags

if TYPE_CHECKING:
    from server.hosting import Host
    from steering.evaluate.job import Evaluation
    from steering.evaluate.responses import Question, Reply
    from steering.models import LanguageModel

SUMMARY = "compare profiles on prompts: a table, JSON, plots and an HTML page"

_DEMO_PER_KIND = 200


def register(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="directory or hub id; without it, the demo model on its held-out prompts"
    )
    parser.add_argument("--revision", help="revision of a model from the hub")
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        type=Path,
        metavar="PATH",
        help="profile file, or directory of them; may be repeated; raw is always compared",
    )
    parser.add_argument(
        "--prompts",
        action="append",
        default=[],
        metavar="FILE[:LABEL|:DATASET]",
        help="prompts, as a published data set or FILE:harmful, FILE:benign; may be repeated",
    )
    parser.add_argument("--out", required=True, type=Path, help="directory for the results")
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help=f"at most N prompts of each class of a file (demo: {_DEMO_PER_KIND})",
    )
    parser.add_argument(
        "--strengths", default="", metavar="S,S,...", help="also evaluate profiles at these"
    )
    parser.add_argument("--max-tokens", type=int, help="of a reply (default: 128; demo model: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="(default: 0, greedy)")
    parser.add_argument("--seed", type=int, default=0, help="of --temperature and --limit")
    parser.add_argument(
        "--judge",
        default="phrases",
        metavar="SPEC",
        help="what judges replies: phrases (default), hf:ID or hf:FORMAT=ID of a classifier",
    )
    parser.add_argument(
        "--judge-batch", type=int, default=8, help="replies a classifier reads at once (default: 8)"
    )
    parser.add_argument("--text", type=Path, help="text file for the perplexity")
    parser.add_argument(
        "--choices",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="multiple choice, .jsonl of question, choices, answer; may be repeated",
    )
    parser.add_argument(
        "--kl-tokens", type=int, default=16, help="of raw's replies, at least 8 (default: 16)"
    )
    parser.add_argument(
        "--kl-prompts", type=int, default=64, help="of each label; 0: no KL (default: 64)"
    )
    template_flags.register(parser)
    parser.add_argument("--no-plots", action="store_true", help="only the table and the JSON")
    parser.add_argument("--allow-derived-base", action="store_true", help="as `serve` does")
    parser.add_argument("--device", default="auto", help="torch device (default: auto)")
    parser.add_argument("--dtype", default="auto", help="of weights and activations")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument(
        "--max-num-seqs", type=int, default=32, help="replies computed at once (default: 32)"
    )


def run(arguments: argparse.Namespace) -> int:
    # What can be wrong with the arguments shows before the model is loaded.
    strengths = _strengths(arguments.strengths)
    template_flags.check(arguments)
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError("--limit is at least 1")
    sets = _prompt_sets(arguments)
    if not arguments.no_plots:
        _check_matplotlib()

    from server.hosting import open_host
    from server.settings import load_settings
    from steering.evaluate.run import evaluate
    from steering.evaluate.table import render
    from steering.judge import make_judge

    judge = make_judge(
        arguments.judge, device=_device(arguments.device), batch_size=arguments.judge_batch
    )
    names = ("model", "revision", "device", "dtype", "threads", "max_num_seqs")
    settings = {name: getattr(arguments, name) for name in (*names, "allow_derived_base")}
    # What came before must not round a reply differently.
    settings |= {"profile": arguments.profile, "prefix_cache_mib": 0}
    host = open_host(load_settings(settings))
    job = replace(_evaluation(arguments, host, sets, strengths), judge=judge)
    try:
        results = evaluate(job, arguments.out, _answerer(host, job.lm))
    except KeyboardInterrupt:
        print(
            f"Interrupted. The responses so far are in {arguments.out}; the same command goes on "
            "from there.",
            file=sys.stderr,
        )
        raise
    print("\n".join(render(results)))
    if not arguments.no_plots:
        from steering.evaluate.page import write_page
        from steering.evaluate.plots import draw_plots

        write_page(results, draw_plots(results, arguments.out), arguments.out / "report.html")
    print(f"\nThe results are in {arguments.out}")
    return 0


def _device(name: str) -> str:
    """What `auto` means, for a judge as for the model."""
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _answerer(
    host: Host, lm: LanguageModel
) -> Callable[[Sequence[Question], Callable[[int, Reply], object]], None]:
    """Answers on the host's engine, which is closed then: one thread at a time has the model."""
    from dataclasses import replace

    from server.engine.batch import EngineAnswerer
    from steering.template import TemplateForm, form_of

    # Probes hold for prompts of the form that they were fitted on, whatever its date.
    fitted = host.monitor.template if host.monitor is not None else TemplateForm()
    probes = fitted == replace(form_of(lm), template_date=fitted.template_date)

    def answer(questions: Sequence[Question], on_done: Callable[[int, Reply], object]) -> None:
        host.start()
        try:
            EngineAnswerer(host.engine, probes=probes)(questions, on_done)
        finally:
            host.close()

    return answer


def _evaluation(
    arguments: argparse.Namespace, host: Host, sets: list[Any], strengths: tuple[float, ...]
) -> Evaluation:
    from dataclasses import replace

    from steering.demo import DEMO_NAME, suite
    from steering.evaluate.arms import Decoding
    from steering.evaluate.job import Evaluation, Utility
    from steering.evaluate.utility import read_choices, text_passages

    lm = template_flags.apply(host.lm, arguments)
    is_demo = arguments.model is None
    utility = Utility(kl_tokens=arguments.kl_tokens, kl_prompts=arguments.kl_prompts)
    if is_demo:
        # Its path is this machine's business.
        lm = replace(lm, name=DEMO_NAME)
        demo = suite.utility(lm, arguments.limit or _DEMO_PER_KIND)
        utility = replace(
            utility, passages=demo.passages, source=demo.source, questions=demo.questions
        )
    if arguments.text is not None:
        passages = text_passages(lm, arguments.text)
        utility = replace(utility, passages=passages, source=str(arguments.text))
    if arguments.choices:
        questions = {path.stem: read_choices(path) for path in arguments.choices}
        utility = replace(utility, questions=questions)
    default = suite.DECODING.max_tokens if is_demo else Decoding().max_tokens
    decoding = Decoding(
        max_tokens=arguments.max_tokens or default,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    return Evaluation(
        lm,
        list(host.profiles),
        sets,
        decoding=decoding,
        strengths=strengths,
        utility=utility,
        progress=sys.stderr.isatty(),
    )


def _prompt_sets(arguments: argparse.Namespace) -> list[Any]:
    from steering.demo import suite
    from steering.evaluate.arms import distinct_names, read_prompt_file
    from steering.prompts import PromptSet
    from steering.selection import sample

    if not arguments.prompts:
        if arguments.model is not None:
            raise ValueError("give --prompts FILE, at least once")
        return suite.prompt_sets(arguments.limit or _DEMO_PER_KIND)
    found = [read_prompt_file(argument) for argument in arguments.prompts]
    distinct_names(found)
    if arguments.limit is not None:
        found = [
            replace(
                each,
                prompts=PromptSet(
                    tuple(sample(each.prompts.prompts, arguments.limit, arguments.seed))
                ),
            )
            for each in found
        ]
    return found


def _strengths(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"--strengths {text}: write numbers, as in 0,0.5,1") from None


def _check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(
            "the plots need matplotlib: pip install 'pilothouse[eval]', or use --no-plots"
        ) from None
