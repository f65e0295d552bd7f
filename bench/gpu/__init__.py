"""``python -m bench gpu``: its stages, how each is kept to its time, and the figures it is for."""
