"""Tools that inspect our own code: time, machine instructions, memory, imports. They compare no libraries."""
