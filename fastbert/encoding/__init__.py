"""Texts to vectors: the Encoder, and several processes that share its work."""
