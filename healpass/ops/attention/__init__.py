"""Scaled dot-product attention: floats, integers, exact. Imports `products` and `reproducible`."""
