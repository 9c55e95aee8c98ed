"""Number formats and error bounds. Lowest layer: may import torch and sympy, nothing of healpass.

Knows nothing of graphs, models or devices.
"""
