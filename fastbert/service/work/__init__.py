"""What a model can be asked for: how it becomes pieces of tokens, and what a batch of pieces comes to."""
