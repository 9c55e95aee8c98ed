"""Matrix products: FP32-equivalent, exact, grouped, sharded. Imports `ops.reproducible`."""
