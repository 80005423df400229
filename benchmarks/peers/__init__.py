"""By whom else: the libraries that people use."""
