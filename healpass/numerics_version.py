"""The version of the bits of `precision="exact"`. Imports nothing.

Two machines with the same number, weights, tokens and options get the same logits, bit for bit.
`tests/golden/exact_digests.json` holds digests that only a new number may change; CONTRIBUTING
says when it may be raised.
"""

NUMERICS_VERSION = 1
