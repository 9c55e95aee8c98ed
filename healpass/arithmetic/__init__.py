"""Number formats and error bounds. Lowest layer: may import torch and sympy, nothing of healpass.

Knows nothing of graphs, models or devices.
"""

from healpass.arithmetic.formats import unit_roundoff

__all__ = ["unit_roundoff"]
