"""From result files to pages and pictures."""
