"""Optimizer states in host memory, and on the device only while they are needed.

Depends on no model and no schedule: callers pass the buckets that are updated next.
"""
