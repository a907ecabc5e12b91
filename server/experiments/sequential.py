"""Statistics that hold however often one looks, and whenever one stops.

A 95 % interval is wrong with probability 0.05 at one look that was fixed beforehand; watched after
every answer it is sooner or later wrong for sure. A *confidence sequence* is right at all looks
together with probability 1 - alpha. Here: asymptotic confidence sequences,

    estimate +- c(n) se(n),  c(n) = sqrt(2 (n rho^2 + 1) / (n rho^2) log(sqrt(n rho^2 + 1) / alpha))

(Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas 2021, arXiv 2103.06476, Theorem 2.2: a Gaussian
mixture boundary with the running standard deviation), with `se` clustered by unit:

    se^2 = V / n^2,   V = sum over units of (Y_u - R N_u)^2,   R = sum Y_u / sum N_u,   n = sum N_u

which is the delta method for a ratio of two means over units (Deng, Knoblich and Lu 2018,
doi:10.1145/3219819.3219919), Y_u the sum and N_u the number of a unit's values.

*Why n counts values and not units.* Where each unit sends one request they are the same. Where
units return, the estimate moves although no unit is new; a clock of units would stand still and
the looks in between would go unpaid. On the clock of values the standardised error of any two
looks correlates at least as a random walk's, sqrt(n_s / n_t), as long as answers of one unit do not
correlate negatively, and by Slepian's inequality (1962) it then crosses the boundary at most as
often. Simulated in tests/server/experiments.

Not covered: effects that change over time (the interval is for the mean so far), and fewer than
`LEAST_UNITS` units, for which the normal approximation is no guide: there is no interval then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

LEAST_UNITS = 25
"""Of each arm, before there is an interval: effective units, so that one that sends most of the
requests does not pass for many."""


@dataclass(frozen=True)
class Boundary:
    """The normal mixture's boundary; `rho` says at which n it is tightest.

    Args:
        alpha: two-sided.
    """

    alpha: float
    rho: float

    @classmethod
    def tightest_at(cls, n: float, alpha: float) -> Boundary:
        """`rho^2 = (-2 log alpha + log(-2 log alpha + 1)) / n`, within a few per cent of the best.

        Same paper, appendix on the choice of rho.
        """
        x = -2 * math.log(alpha)
        return cls(alpha, math.sqrt((x + math.log(x + 1)) / n))

    def factor(self, n: Floats | Ints) -> Floats:
        """`c(n)`: how many standard errors the interval reaches to either side."""
        t = np.asarray(n, float) * self.rho**2
        with np.errstate(divide="ignore"):
            found: Floats = np.sqrt(2 * (t + 1) / t * np.log(np.sqrt(t + 1) / self.alpha))
        return found

    def p_value(self, z: Floats, n: Floats | Ints) -> Floats:
        """The alpha at which an interval of this `rho` would just exclude zero, at most 1.

        The reciprocal of the normal mixture's likelihood ratio: the smallest one so far is an
        anytime-valid p-value. `z` is estimate over standard error.
        """
        t = np.asarray(n, float) * self.rho**2
        with np.errstate(over="ignore", under="ignore"):
            found: Floats = np.sqrt(t + 1) * np.exp(-np.square(z) * t / (2 * (t + 1)))
        return np.minimum(1.0, found)


@dataclass(frozen=True)
class Running:
    """A clustered mean after each of its values.

    Args:
        n: values so far, `[N]`.
        units: units so far, `[N]`.
        effective: units of one size that would weigh as much, `n^2 / sum N_u^2` (Kish 1965), `[N]`.
        mean, se: `[N]`.
    """

    n: Ints
    units: Ints
    effective: Floats
    mean: Floats
    se: Floats


def running_mean(
    values: Floats, units: Ints, *, extremes: tuple[float, float] | None = None
) -> Running:
    """Mean and clustered standard error after each value, in O(N log N).

    Args:
        values: `[N]`, in the order of time.
        units: `[N]`, whom each value belongs to.
        extremes: smallest and largest possible value. One unit of each is added to the variance
            (not to the mean), so that an arm without a single refusal does not count as certain.
    """
    values, units = np.asarray(values, float), np.asarray(units)
    n = np.arange(1, len(values) + 1)
    mean = np.cumsum(values) / np.maximum(n, 1)
    before_sum, before_n = _before(values, units)
    seen = np.cumsum(before_n == 0)
    # What each value adds to the sums over units of Y^2, Y N and N^2.
    yy = np.cumsum(values * (2 * before_sum + values))
    yn = np.cumsum(before_sum + values * (before_n + 1))
    nn = np.cumsum(2 * before_n + 1)
    centre, extra = mean, np.zeros_like(mean)
    if extremes is not None:
        low, high = extremes
        centre = (mean * n + low + high) / (n + 2)
        extra = (low - centre) ** 2 + (high - centre) ** 2
    spread = np.maximum(yy - 2 * centre * yn + centre**2 * nn, 0.0) + extra
    with np.errstate(divide="ignore", invalid="ignore"):
        effective = n**2 / nn
        few = effective < 1 + 1e-9
        se = np.sqrt(np.where(few, np.inf, spread * effective / (effective - 1))) / n
    return Running(n, seen, effective, mean, se)


def rate_bounds(
    mean: Floats, se: Floats, n: Floats | Ints, factor: Floats
) -> tuple[Floats, Floats]:
    """Wilson's interval (1927) of rates, of as many independent values as would have these errors.

    Near 0 and 1 an interval of the same reach to both sides is wrong too often.

    Args:
        se: as `running_mean` has it, with extremes; where it is infinite the interval is [0, 1].
        factor: in place of the normal quantile.
    """
    drawn = (mean * n + 1) / (n + 2)  # what the standard error is of
    effective = np.minimum(n, drawn * (1 - drawn) / np.square(se))
    z2 = np.square(factor)
    centre = (mean * effective + z2 / 2) / (effective + z2)
    reach = factor * np.sqrt(mean * (1 - mean) * effective + z2 / 4) / (effective + z2)
    return np.maximum(0.0, centre - reach), np.minimum(1.0, centre + reach)


def _before(values: Floats, units: Ints) -> tuple[Floats, Floats]:
    """Sum and number of the same unit's earlier values, for each value."""
    order = np.argsort(units, kind="stable")
    sums = np.cumsum(values[order]) - values[order]
    place = np.arange(len(values))
    first = np.ones(len(values), bool)
    first[1:] = units[order][1:] != units[order][:-1]
    start = np.maximum.accumulate(np.where(first, place, 0))
    before_sum, before_n = np.empty(len(values)), np.empty(len(values))
    before_sum[order] = sums - sums[start]
    before_n[order] = place - start
    return before_sum, before_n


@dataclass(frozen=True)
class ConfidenceSequence:
    """Estimate, interval and p-value at every look; nan, infinite and 1 where it is too early.

    Args:
        at: position in the time-ordered input that each look comes after, `[K]`.
        n, units: values and units of all arms together.
        factor: how many standard errors the interval reaches to either side.
        p: anytime-valid against zero: the smallest so far.
    """

    at: Ints
    n: Ints
    units: Ints
    estimate: Floats
    se: Floats
    factor: Floats
    p: Floats

    @property
    def low(self) -> Floats:
        return self.estimate - self.factor * self.se

    @property
    def high(self) -> Floats:
        return self.estimate + self.factor * self.se

    def __len__(self) -> int:
        return len(self.at)


def mean_sequence(
    values: Floats,
    units: Ints,
    boundary: Boundary,
    *,
    extremes: tuple[float, float] | None = None,
) -> ConfidenceSequence:
    """Confidence sequence for a mean: of one arm, or of paired differences. See `running_mean`."""
    found = running_mean(values, units, extremes=extremes)
    return _sequence(
        boundary, found.n - 1, found.n, found.units, found.effective, found.mean, found.se
    )


def difference_sequence(
    values: Floats,
    units: Ints,
    treated: Bools,
    boundary: Boundary,
    *,
    extremes: tuple[float, float] | None = None,
) -> ConfidenceSequence:
    """Confidence sequence for the difference of two arms' means, `treated` less the others.

    The arms are independent, so squared standard errors add up; the clock is the number of values
    of both (the paper's average treatment effect of a randomised experiment, with the arms' shares
    in place of propensities).

    Of the two errors that are right where the arms are alike, each arm's own spread and the spread
    of both, the larger counts. They are one where the arms are of one size; in an arm much smaller
    than the other, its own spread is too small just when it has had few refusals by chance.

    Args:
        values, units, treated: `[N]`, both arms in the order of time.
    """
    values, units = np.asarray(values, float), np.asarray(units)
    treated = np.asarray(treated, bool)
    one = running_mean(values[treated], units[treated], extremes=extremes)
    other = running_mean(values[~treated], units[~treated], extremes=extremes)
    # How far each arm's own stream has come after each value of both.
    i, j = np.cumsum(treated) - 1, np.cumsum(~treated) - 1
    both = np.flatnonzero((i >= 0) & (j >= 0))
    i, j = i[both], j[both]
    n, e, m, f = one.n[i], one.effective[i], other.n[j], other.effective[j]
    spread, others = np.square(one.se[i]) * e, np.square(other.se[j]) * f
    apart = spread / e + others / f
    pooled = (n * spread + m * others) / (n + m) * (1 / e + 1 / f)
    return _sequence(
        boundary,
        both,
        n + m,
        one.units[i] + other.units[j],
        np.minimum(e, f),
        one.mean[i] - other.mean[j],
        np.sqrt(np.maximum(apart, pooled)),
    )


def _sequence(
    boundary: Boundary, at: Ints, n: Ints, units: Ints, fewest: Floats, estimate: Floats, se: Floats
) -> ConfidenceSequence:
    # Values that are all the same show nothing of how far others may be.
    se = np.where((fewest >= LEAST_UNITS) & (se > 0), se, np.inf)
    p = np.minimum.accumulate(boundary.p_value(estimate / se, n)) if len(at) else np.empty(0)
    return ConfidenceSequence(at, n, units, estimate, se, boundary.factor(n), p)


def values_needed(
    boundary: Boundary, spread: float, margin: float, *, most: float = 1e8
) -> float | None:
    """Values until the interval reaches no further than `margin`; None for more than `most`.

    Args:
        spread: standard error times sqrt(n), taken to stay as it is.
    """

    def reach(n: float) -> float:
        return float(boundary.factor(np.array(n))) * spread / math.sqrt(n)

    low, high = 1.0, most
    if margin <= 0 or reach(high) > margin:
        return None
    while high / low > 1.001:  # reach falls with n
        middle = math.sqrt(low * high)
        low, high = (middle, high) if reach(middle) > margin else (low, middle)
    return high


SAMPLE_RATIO_PRIOR = 100.0
"""Total weight of the Dirichlet prior: it looks for shares that are off by about 1/20."""


def sample_ratio_evidence(arms: Ints, shares: Sequence[float]) -> Floats:
    """Evidence after each unit that units are not spread over the arms as they should be.

    The logarithm of the Bayes factor of a Dirichlet prior around the expected shares against these
    shares,

        E_n = prod_k [ Gamma(a_k + s_k) / (Gamma(a_k) theta_k^s_k) ] * Gamma(A) / Gamma(A + n)

    with a = A theta: a martingale if the shares are right, so that it ever exceeds 1 / alpha with
    probability at most alpha (Lindon and Malek 2022, arXiv 2011.03567, sequential test of a
    multinomial hypothesis). Non-asymptotic.

    Args:
        arms: `[N]`, index of each unit's arm, in the order in which units came.
        shares: expected, of all arms; an arm whose share is 0 may have no units.

    Returns `[N]`.
    """
    arms = np.asarray(arms)
    n = np.arange(1, len(arms) + 1)
    evidence = gammaln(SAMPLE_RATIO_PRIOR) - gammaln(SAMPLE_RATIO_PRIOR + n)
    for arm, share in enumerate(shares):
        if share > 0:
            seen, prior = np.cumsum(arms == arm), SAMPLE_RATIO_PRIOR * share
            evidence += gammaln(prior + seen) - gammaln(prior) - seen * math.log(share)
        elif np.any(arms == arm):
            raise ValueError(f"arm {arm} has units although its share is 0")
    return np.asarray(evidence, float)
