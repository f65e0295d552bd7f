"""What `bench.gpu_suite` is made of: its stages, how each is kept to its time, and the figures it is for."""
