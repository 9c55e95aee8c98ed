"""How often will two configurations choose another token? Predicted from margins and their shift.

Layer: `study`. Imports `errors` only, runs no model.

**Model.** Both configurations score the same text (teacher forcing). At a position, the first
puts its best token ahead of its second by gap >= 0 nats, and the second sees that lead changed by
shift, so the best token flips where gap + shift < 0. Suppose that shift is as often up as down and
does not depend on gap. Then the flip rate per token is

    f = 1/2 E[P(gap < |shift|)]        (arXiv 2609.25624)

over all pairs of a measured gap and a measured shift, paired or not: n gaps and n shifts give n^2
cases, which is why a few prompts tell what thousands would. Two refinements:

- Logits of 16 bits tie. `argmax` takes the lower index of equals, so gap = |shift| > 0 flips half
  as often as gap < |shift|, and counts by half.
- Near zero P(gap < x) = rho x, the key law. Shifts of FP32 (1e-5 nats) lie below every gap in a
  short sample, so below a window h the measured distribution is replaced by that line.
  h is the k-th smallest gap, k = n^(2/3) / 2: the line's relative error from the density's slope
  (order k / n) then stays a fixed small part of its sampling error (order 1 / sqrt(k)).

**Interval.** Tokens of one prompt are not independent, prompts are. With phi(gap, shift) = 1, 1/2
or 0 as above, f is half a two-sample V-statistic, and its first-order (Hoeffding) projections are
a(gap) = E[phi(gap, shift)] over shifts and b(shift) = E[phi(gap, shift)] over gaps. So the error
of f is, to first order, the sum over prompts p of

    psi_p = 1/(2n) sum over tokens t of p of (a_t - 2f) + (b_t - 2f),

for n tokens in all (van der Vaart, Asymptotic Statistics, sections 12.1 and 12.2); that the window
is random adds nothing at first order where the law is linear. se^2 = sum (psi_p / (1 - n_p/n))^2
for a prompt of n_p tokens: a prompt pulls f towards itself, which hides n_p/n of its deviation
(Bell and McCaffrey's CR3, 2002, on the wide side). The interval is symmetric in log f, as rates
are positive and skewed, with Student's quantile of m - 1 degrees for m prompts: f exp(+-t se/f).
With one prompt it is the model's whole range, 0 to 1/2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from healpass.errors import StudyError
from healpass.study.run.records import Margins

#: The share of repetitions in which an interval holds the truth.
LEVEL = 0.95
#: Lengths of a run that a report speaks of: an answer, and a long chain of thought.
LENGTHS = (1_000, 16_000)


def compare_logits(reference: Tensor, other: Tensor) -> Margins:
    """Measure gap, shift and flips between two configurations' logits on the same text.

    Differences of logits are differences of log-probabilities, so no softmax is taken. They are
    formed in FP64: exact for 16-bit logits, and rounded once for FP32.

    Args:
        reference: `[T, V]`, any floating dtype; V >= 2.
        other: `[T, V]`, any floating dtype.

    Raises:
        StudyError: The shapes differ or have no two tokens to compare, or a lead is not finite.
    """
    if reference.shape != other.shape or reference.dim() != 2 or reference.shape[1] < 2:
        raise StudyError(
            f"Margins need two [T, V] tensors of one shape with V >= 2, found "
            f"{tuple(reference.shape)} and {tuple(other.shape)}. Score the same text twice."
        )
    best = reference.argmax(dim=1, keepdim=True)
    others = reference.scatter(1, best, -math.inf)
    runner_up = others.argmax(dim=1, keepdim=True)
    # From `others`: where every other token is masked, the lead is infinite and not 0.
    gap = reference.gather(1, best).double() - others.gather(1, runner_up).double()
    lead = other.gather(1, best).double() - other.gather(1, runner_up).double()
    flipped = other.argmax(dim=1, keepdim=True) != best
    return Margins(gap.squeeze(1), (lead - gap).squeeze(1), flipped.squeeze(1))


@dataclass(frozen=True, eq=False)
class MarginDistribution:
    """The distribution of the gap between best and second token, linear near zero.

    Attributes:
        gaps: `[n]`, FP64, nats, sorted.
        window: h, below which the key law's line stands for the sample. 0 if every gap is 0.
    """

    gaps: Tensor
    window: float

    @classmethod
    def of(cls, gaps: Tensor) -> MarginDistribution:
        """Sort the gaps and set the window to the k-th smallest, k = n^(2/3) / 2.

        Ties can put zeros there; the window is then the smallest positive gap.

        Raises:
            StudyError: There are no gaps.
        """
        if gaps.numel() == 0:
            raise StudyError("A distribution of margins needs at least one token, but has none.")
        ordered = gaps.double().sort().values
        k = math.ceil(gaps.numel() ** (2 / 3) / 2)
        positive = ordered[ordered > 0]
        smallest = positive[0].item() if positive.numel() else 0.0
        return cls(ordered, max(ordered[k - 1].item(), smallest))

    @property
    def density(self) -> float:
        """rho, the share of gaps per nat near zero, those that the format ties to 0 included."""
        return self._inner / self.window if self.window > 0 else 0.0

    def share_below(self, x: Tensor) -> Tensor:
        """Return P(gap < x) + 1/2 P(gap = x) for x > 0, else 0.

        Args:
            x: Any shape, nats.
        """
        x = x.double()
        # A tie flips at any shift, so the line starts above 0 where there are ties.
        line = self._ties + (self._inner - self._ties) * (x / self.window) if self.window else x
        share = torch.where(x < self.window, line, _share_below(self.gaps, x))
        return torch.where(x > 0, share, torch.zeros_like(share))

    @property
    def _ties(self) -> float:
        return (self.gaps == 0).double().mean().item()

    @property
    def _inner(self) -> float:
        return _share_below(self.gaps, self.gaps.new_tensor(self.window)).item()

    def expected_below(self, sizes: Tensor) -> Tensor:
        """Return a(gap) `[n]` in the order of `gaps`: the mean of phi over |shift|, sorted.

        A gap inside the window is equally likely anywhere in it: it lies below a share s/h of a
        shift s < h. One on the window's edge counts by half, as `share_below` counts it.
        """
        h = self.window
        above = 1 - _share_below(sizes, self.gaps)
        inside = torch.where(sizes < h, sizes / h, torch.zeros_like(sizes)).mean()
        beyond = (sizes >= h).double().mean()
        above = torch.where(self.gaps == h, above + inside / 2, above)
        above = torch.where(self.gaps < h, beyond + inside, above)
        return torch.where(self.gaps == 0, (sizes > 0).double().mean(), above)


def _share_below(ordered: Tensor, x: Tensor) -> Tensor:
    """Return the share of `ordered` below x, equals counted by half."""
    x = x.contiguous()
    below = torch.searchsorted(ordered, x)
    up_to = torch.searchsorted(ordered, x, right=True)
    return (below + up_to).double() / (2 * ordered.numel())


@dataclass(frozen=True)
class Agreement:
    """The chance that two runs write the same `tokens` tokens, with its 95% interval."""

    tokens: int
    chance: float
    low: float
    high: float


@dataclass(frozen=True)
class FlipRate:
    """The predicted rate of flips per token between two configurations.

    Attributes:
        rate: f.
        relative_error: Standard error of log f; infinite with one prompt.
        prompts: How many prompts were measured.
        tokens: How many tokens they have together.
        density: rho, the share of margins per nat near zero.
        median_shift: Median of |shift| in nats.
    """

    rate: float
    relative_error: float
    prompts: int
    tokens: int
    density: float
    median_shift: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of f; (0, 0) where no margin moved at all."""
        return self._quantile((1 - LEVEL) / 2), self._quantile((1 + LEVEL) / 2)

    def measured_interval(self, tokens: int) -> tuple[float, float]:
        """Return where the flip rate counted on `tokens` tokens lies in 95% of measurements.

        Wider than `interval` by the chance of the count: Poisson, given f, averaged over 99
        equally likely f. It is meant for a count on the prompts of the prediction, and wide
        there, as the two err together. A few other prompts also differ among themselves.

        Raises:
            StudyError: `tokens` is not positive.
        """
        if tokens < 1:
            raise StudyError(f"A flip rate is counted on at least one token, not on {tokens}.")
        rates = [self._quantile((i + 0.5) / 99) for i in range(99)]
        means = torch.tensor(rates, dtype=torch.float64) * tokens
        counts = [_poisson_quantile(p, means, tokens) for p in ((1 - LEVEL) / 2, (1 + LEVEL) / 2)]
        return counts[0] / tokens, counts[1] / tokens

    def agreement(self, tokens: int) -> Agreement:
        """Return (1 - f)^tokens: the chance that no token of a run flips.

        It takes one f for all prompts. Where prompts differ in f, more of them agree than this
        (Jensen), so it errs on the pessimistic side.
        """
        low, high = self.interval
        chances = [math.exp(tokens * math.log1p(-f)) for f in (self.rate, high, low)]
        return Agreement(tokens, *chances)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON, with the agreement over `LENGTHS` tokens."""
        known = math.isfinite(self.relative_error)
        return asdict(self) | {
            "relative_error": self.relative_error if known else None,
            "interval": list(self.interval),
            "agreement": [asdict(self.agreement(tokens)) for tokens in LENGTHS],
        }

    def _quantile(self, p: float) -> float:
        """Return the p-quantile of f, within the model's range."""
        if self.rate == 0:
            return 0.0
        if math.isinf(self.relative_error):
            return 0.0 if p < 0.5 else 0.5  # One prompt says nothing of how prompts differ.
        t = student_quantile(p, self.prompts - 1)
        return min(0.5, self.rate * math.exp(min(t * self.relative_error, 700.0)))


def predict_flip_rate(prompts: Sequence[Margins]) -> FlipRate:
    """Predict the flip rate per token between two configurations, with its error.

    Args:
        prompts: One entry per prompt; those without tokens are left out. What is independent
            should stand alone: cut one long text into blocks only if you believe they are.

    Raises:
        StudyError: No prompt has a token.
    """
    prompts = [margins for margins in prompts if margins.gap.numel()]
    if not prompts:
        raise StudyError("A prediction needs at least one prompt with a token, but there is none.")
    gaps = torch.cat([margins.gap for margins in prompts])
    sizes = torch.cat([margins.shift for margins in prompts]).abs()
    distribution = MarginDistribution.of(gaps)
    below = distribution.share_below(sizes)
    rate = below.mean().item() / 2
    return FlipRate(
        rate=rate,
        relative_error=_relative_error(prompts, distribution, gaps, sizes, below),
        prompts=len(prompts),
        tokens=gaps.numel(),
        density=distribution.density,
        median_shift=sizes.median().item(),
    )


def measured_flip_rate(prompts: Sequence[Margins]) -> float:
    """Return the share of tokens whose best token differs, to hold against the prediction.

    Raises:
        StudyError: No prompt has a token.
    """
    flipped = [margins.flipped for margins in prompts if margins.flipped.numel()]
    if not flipped:
        raise StudyError("A flip rate needs at least one prompt with a token, but there is none.")
    return torch.cat(flipped).double().mean().item()


def _relative_error(
    prompts: Sequence[Margins],
    distribution: MarginDistribution,
    gaps: Tensor,
    sizes: Tensor,
    below: Tensor,
) -> float:
    """Return se(f) / f from the projections summed over each prompt."""
    double_rate = below.mean()
    if double_rate == 0:
        return 0.0
    if len(prompts) == 1:
        return math.inf
    expected = torch.empty_like(below)
    expected[gaps.argsort(stable=True)] = distribution.expected_below(sizes.sort().values)
    lengths = [margins.gap.numel() for margins in prompts]
    deviation = expected + below - 2 * double_rate
    psi = torch.stack([x.sum() for x in deviation.split(lengths)]) / (2 * gaps.numel())
    psi /= 1 - torch.tensor(lengths, dtype=torch.float64) / gaps.numel()
    return (psi.square().sum().sqrt() / (double_rate / 2)).item()


def student_quantile(p: float, degrees: int) -> float:
    """Return the p-quantile of Student's t, from the finite sums for whole degrees of freedom.

    With t = sqrt(degrees) tan(theta), P(|T| < t) is a polynomial in sin and cos of theta
    (Abramowitz and Stegun, 26.7.3 and 26.7.4); theta is found by bisection. Above 300 degrees it
    stays that of 300: at most 0.5% too wide at 95%, and as quick for 10,000 prompts.
    """
    degrees = min(degrees, 300)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        theta = (low + high) / 2
        low, high = (theta, high) if _within(theta, degrees) < abs(2 * p - 1) else (low, theta)
    return math.copysign(math.sqrt(degrees) * math.tan(low), 2 * p - 1)


def _within(theta: float, degrees: int) -> float:
    """P(|T| < sqrt(degrees) tan(theta))."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2 == 1
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for i in range(2 if odd else 1, degrees, 2):
        total += term
        term *= cosine * cosine * i / (i + 1)
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def _poisson_quantile(p: float, means: Tensor, largest: int) -> int:
    """Return the least count that an average of Poisson distributions does not exceed with p."""
    low, high = -1, largest
    while high - low > 1:
        count = (low + high) // 2
        # P(N <= c) is the regularized upper incomplete gamma function Q(c + 1, mean).
        chance = torch.special.gammaincc(means.new_tensor(count + 1.0), means).mean()
        low, high = (low, count) if chance >= p else (count, high)
    return high
