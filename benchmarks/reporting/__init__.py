"""Makes pages and plots from result files."""
