"""How it is run, and what is written down. Imports `plan`."""
