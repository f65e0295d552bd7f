"""Optimizer states in host memory, and on the device only while they are needed.

Knows no schedule and no model: it is told which buckets of parameters are trained now, and which come next.
"""
