"""Whole processes, from the start of Python to the last picture."""
