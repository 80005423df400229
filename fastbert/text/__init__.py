"""Texts on their way to the model: the tokenizer, the grouping of texts into batches, and files of texts."""
