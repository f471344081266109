"""Optimizers: ours, and the hooks for those of torch. They call the runtime as a training loop does."""
