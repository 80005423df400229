"""Fine-tuning: files of examples, features, the loop, and metrics that say what they measure."""
