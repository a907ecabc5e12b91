"""Statistics of experiments: how often they are wrong, and how soon they are right.

Every run is looked at after every value. Nothing is timed.
"""

from __future__ import annotations

import argparse

from tests.server.experiments.simulate import (
    ALPHA,
    Found,
    independent,
    one_after_another,
    returning,
    watched,
    watched_naively,
    watched_pairs,
    watched_ratio,
)

N, HORIZON = 8000, 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the runs")
    runs = 200 if parser.parse_args().quick else 2000
    print(f"{runs} runs each, alpha {ALPHA:g}, up to {N} answers in both arms, horizon {HORIZON}")
    print("\nSaid to differ although both arms are alike (at most 0.05 is promised):")
    same = independent(0.15, 0.15, N)
    _row("naive 95 % interval from 100 answers an arm on", watched_naively(same, runs=runs))
    for name, source in {
        "rate 0.15, a request a unit": same,
        "rate 0.02, a request a unit": independent(0.02, 0.02, N),
        "rate 0.02, one arm a tenth of all": independent(0.02, 0.02, N, share=0.1),
        "rate 0.95, one arm a tenth of all": independent(0.95, 0.95, N, share=0.1),
        "400 units that return, rates from Beta(1, 5)": returning(1, 5, 400, N),
        "80 units that return, rates nearly alike": returning(150, 850, 80, N),
        "400 units, few of them send most requests": returning(1, 5, 400, N, heavy=True),
        "400 units, one after another": one_after_another(1, 5, 400, N),
    }.items():
        _row(name, watched(source, runs=runs, horizon=HORIZON))
    pairs = {"runs": runs, "units": 300, "n": N // 2, "horizon": HORIZON}
    _row("shadow pairs of 300 units that return, rate 0.15", watched_pairs(0.15, 0.15, **pairs))
    print("\n0.15 against 0.22:")
    _row("separate arms", watched(independent(0.15, 0.22, N), runs=runs, horizon=HORIZON), "units")
    _row("shadow pairs", watched_pairs(0.15, 0.22, **pairs), "pairs")
    print("\nSample ratio, expected 50:50, alpha 0.001:")
    for share in (0.5, 0.55):
        found = watched_ratio(share, runs=runs, n=20_000, alpha=0.001)
        _row(f"{1 - share:.0%} and {share:.0%} of 20,000 units", found, "units")


def _row(name: str, found: Found, what: str = "") -> None:
    median = f"  median {found.median:,.0f} {what}" if what and found.share > 0.5 else ""
    print(f"  {name:50} {found.share:6.3f}{median}", flush=True)


if __name__ == "__main__":
    main()
