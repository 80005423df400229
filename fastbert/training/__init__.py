"""Fine-tuning: files of examples, features, the training loop, and metrics with their definitions."""
