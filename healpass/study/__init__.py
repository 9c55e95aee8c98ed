"""The reproducibility study. Uses healpass's public names only."""
