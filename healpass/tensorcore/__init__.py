"""A simulated tensor core: what a GPU's accumulation does to a matmul. May import `arithmetic`."""

from healpass.tensorcore.attention import heal_attention, weighted_values
from healpass.tensorcore.matmul import Accumulation, heal_matmul
from healpass.tensorcore.rules import RULES, AccumulationRule, Schedule
from healpass.tensorcore.simulate import simulate_matmul

__all__ = [
    "RULES",
    "Accumulation",
    "AccumulationRule",
    "Schedule",
    "heal_attention",
    "heal_matmul",
    "simulate_matmul",
    "weighted_values",
]
