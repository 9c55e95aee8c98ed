"""The passes, one file each, run by `graph.pipeline`: no other module of `graph` imports them."""
