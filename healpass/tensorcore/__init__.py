"""A simulated tensor core: what a GPU's accumulation does to a matmul. May import `arithmetic`."""

from healpass.tensorcore.rules import RULES, AccumulationRule, Schedule
from healpass.tensorcore.simulate import simulate_matmul

__all__ = ["RULES", "AccumulationRule", "Schedule", "simulate_matmul"]
