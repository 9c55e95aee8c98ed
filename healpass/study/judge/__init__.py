"""What the records say: metrics, where runs part, and why. Imports `run` and `plan`."""
