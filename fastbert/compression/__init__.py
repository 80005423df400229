"""Smaller and faster models: distillation, pruning, and weights in 8 bits."""
