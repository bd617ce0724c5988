"""All that knows Lightning: the strategy, its arguments, checkpoints and data, and the monitor."""
