"""The demo's held-out table: what each profile does on prompts nobody has fitted anything on.

Binding are held-out verb-thing combinations; held-out phrasings and wrappers stand beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from steering.demo.corpus import KINDS, DemoPrompt, HeldOut, Kind, on_topic, prompts, right_reply
from steering.evaluate import answer_f1, wilson_interval
from steering.generate import generate
from steering.judge import JUDGE_VERSION, Outcome, PhraseJudge, judge
from steering.models import LanguageModel
from steering.plan import BatchPlan, RowEdits, Steering, sites_of
from steering.profile import Profile

REPLY_TOKENS = 64
BENIGN: tuple[Kind, ...] = ("benign",)
TITLES: dict[HeldOut, str] = {
    "combinations": "Held-out verb-thing combinations",
    "phrasings": "Held-out phrasings as well",
    "wrappers": "Held-out jailbreak wrappers as well",
}


# There is no F1 without benign prompts, and the benign replies are the same in every section.
EXTRA_COLUMNS: dict[HeldOut, tuple[str, ...]] = {
    "combinations": ("F1", "perplexity"),
    "phrasings": ("F1",),
    "wrappers": (),
}


def kinds_of(held_out: HeldOut) -> tuple[Kind, ...]:
    """The classes a held-out set has: only jailbroken prompts come in a wrapper."""
    return ("jailbroken",) if held_out == "wrappers" else KINDS


@dataclass(frozen=True)
class Judged:
    """One test prompt and what became of it."""

    prompt: DemoPrompt
    reply: str
    outcome: Outcome
    on_topic: bool


@dataclass(frozen=True)
class Measured:
    """One profile on one held-out set."""

    profile: str
    held_out: HeldOut
    judged: tuple[Judged, ...]

    def of(self, kind: Kind) -> list[Judged]:
        return [j for j in self.judged if j.prompt.kind == kind]

    def rate(self, kind: Kind, outcome: Outcome) -> float:
        found = self.of(kind)
        return sum(j.outcome == outcome for j in found) / len(found)

    def on_topic(self, kind: Kind) -> float:
        found = self.of(kind)
        return sum(j.on_topic for j in found) / len(found)

    @property
    def f1(self) -> float:
        return answer_f1([j.outcome for j in self.judged], [j.prompt.harmful for j in self.judged])

    def to_json(self) -> dict[str, Any]:
        """Counts and intervals per kind, for cards."""
        kinds = {}
        for kind in KINDS:
            found = self.of(kind)
            if found:
                counts = Counter(j.outcome for j in found)
                low, high = wilson_interval(counts["refusal"], len(found))
                kinds[kind] = {
                    "prompts": len(found),
                    "outcomes": dict(sorted(counts.items())),
                    "refusal_rate": counts["refusal"] / len(found),
                    "refusal_rate_95": [low, high],
                    "on_topic_rate": self.on_topic(kind),
                }
        return {
            "held_out": self.held_out,
            "judge": JUDGE_VERSION,
            "f1": self.f1,
            "kinds": kinds,
        }


def measure(
    lm: LanguageModel,
    profile: Profile,
    held_out: HeldOut = "combinations",
    *,
    kinds: Sequence[Kind] | None = None,
    per_kind: int = 400,
    progress: bool = False,
) -> Measured:
    """Answer the test prompts (of these kinds; of all) under a profile and judge every reply."""
    found = prompts("test", tuple(kinds or kinds_of(held_out)), held_out, per_kind=per_kind)
    with tqdm(
        total=len(found), desc=f"{profile.name}, {held_out}", disable=not progress, leave=False
    ) as bar:
        replies = generate(
            lm,
            [lm.encode_prompt(prompt.text) for prompt in found],
            edits=profile.applied(),
            max_tokens=REPLY_TOKENS,
            on_done=bar.update,
        )
    texts = [lm.decode(ids) for ids in replies]
    return Measured(
        profile.name,
        held_out,
        tuple(
            Judged(prompt, text, judge(text), on_topic(text, prompt.task))
            for prompt, text in zip(found, texts, strict=True)
        ),
    )


@torch.inference_mode()
def benign_perplexity(lm: LanguageModel, profile: Profile, *, per_kind: int = 400) -> float:
    """Perplexity of the right replies to plain benign test prompts under a profile."""
    found = prompts("test", BENIGN, per_kind=per_kind)
    total, count = 0.0, 0
    with Steering(lm.sites) as steering:
        steering.attach(sites_of(profile.edits))
        for prompt in found:
            ids = lm.encode_prompt(prompt.text)
            reply = lm.tokenizer(right_reply(prompt), add_special_tokens=False)["input_ids"]
            whole = torch.tensor([[*ids, *reply]], device=lm.device)
            plan = BatchPlan(
                [RowEdits(profile.applied(), len(ids))],
                hidden_size=lm.sites.hidden_size,
                device=lm.device,
            )
            with steering.step(plan, [0], [whole.shape[1]]):
                logits = lm.model(whole, use_cache=False).logits[0].float()
            losses = cross_entropy(logits[len(ids) - 1 : -1], whole[0, len(ids) :], reduction="sum")
            total, count = total + float(losses), count + len(reply)
    return float(torch.tensor(total / count).exp())


def render(
    lm: LanguageModel, profiles: Sequence[Profile], *, per_kind: int = 400, progress: bool = True
) -> Iterator[str]:
    """The table in Markdown, line by line as it is measured."""
    yield caption(per_kind)
    for held_out, title in TITLES.items():
        yield f"\n**{title}**\n"
        yield from rows_of(lm, profiles, held_out, per_kind=per_kind, progress=progress)


def caption(per_kind: int) -> str:
    """What the rates are of, and how often the judge errs who counted them."""
    card = PhraseJudge().card()
    return (
        f"Test prompts per class: {per_kind}. Refusal rate with 95 % Wilson interval, by the judge "
        f"{card.version}: sensitivity {card.sensitivity}, specificity {card.specificity} labelled "
        "replies."
    )


def rows_of(
    lm: LanguageModel,
    profiles: Sequence[Profile],
    held_out: HeldOut = "combinations",
    *,
    per_kind: int = 400,
    progress: bool = True,
) -> Iterator[str]:
    """One held-out set's table in Markdown."""
    kinds = kinds_of(held_out)
    header = ["profile", *(f"refuses {kind}" for kind in kinds), "on topic (worst class)"]
    header += ["degenerate", *EXTRA_COLUMNS[held_out]]
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    for profile in profiles:
        m = measure(lm, profile, held_out, per_kind=per_kind, progress=progress)
        cells = [profile.name]
        for kind in kinds:
            found = m.of(kind)
            refused = sum(j.outcome == "refusal" for j in found)
            low, high = wilson_interval(refused, len(found))
            cells.append(f"{refused / len(found):.3f} [{low:.3f}, {high:.3f}]")
        worst = min(kinds, key=m.on_topic)
        cells.append(f"{m.on_topic(worst):.3f} ({worst})")
        degenerate = sum(j.outcome in ("degenerate", "empty") for j in m.judged)
        cells.append(f"{degenerate / len(m.judged):.3f}")
        if "F1" in EXTRA_COLUMNS[held_out]:
            cells.append(f"{m.f1:.3f}")
        if "perplexity" in EXTRA_COLUMNS[held_out]:
            cells.append(f"{benign_perplexity(lm, profile, per_kind=per_kind):.4f}")
        yield f"| {' | '.join(cells)} |"
