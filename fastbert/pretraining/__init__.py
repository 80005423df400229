"""Pre-training: a vocabulary, text larger than memory, masked words and pairs of segments, and models of any size."""
