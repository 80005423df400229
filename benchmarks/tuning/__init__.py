"""Which launch of a kernel is fastest."""
