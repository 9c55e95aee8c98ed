"""The reproducibility study. Layer: top; uses the public names of healpass only."""
