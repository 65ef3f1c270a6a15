"""Training: settings, the step, the strategy, the loop, checkpoints and runs."""
