"""Triton kernels, one page an op, and their shipped configurations (tuned/<gpu>/<op>.json).

A page has the kernels, `SPACE` (the configurations worth trying), `launch()` (the op itself, arguments as the schema
has them) and `specializations()` (what CI compiles ahead of time for every shipped configuration).
"""
