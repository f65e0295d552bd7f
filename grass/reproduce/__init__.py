"""Reproduction of the tables of the paper: every method at its own best learning rate, on the same data."""
