"""Texts before they are vectors: the tokenizer, which texts go together, and files of them."""
