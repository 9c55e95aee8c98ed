"""Margins and rates that the tests of the prediction start from."""

import torch

from healpass.study.judge.flip_rate import FlipRate
from healpass.study.run.records import Margins


def margins(gap, shift):
    gap, shift = (torch.as_tensor(x, dtype=torch.float64) for x in (gap, shift))
    return Margins(gap, shift, gap + shift < 0)


def known_rate(rate, relative_error=0.0, prompts=20):
    return FlipRate(rate, relative_error, prompts, 1000, 0.1, 0.01)
