"""Smaller and faster models: students that learn from a teacher, parts that are cut out, weights in 8 bits."""
