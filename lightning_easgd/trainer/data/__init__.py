"""Which replica trains on what: what Lightning's training loop has to be told of it."""
