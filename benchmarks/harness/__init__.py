"""Measures a case: its rows, clocks, machine, processes and result file."""
