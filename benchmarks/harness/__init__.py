"""How a case is measured: its rows, clocks, machine, processes and result file."""
