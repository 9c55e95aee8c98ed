"""Functions with one result, bit for bit, wherever they run: sums, norms, exp and the like."""
