"""How it is shown: the page, its plots, the tables of the terminal. Imports `judge` and below."""
