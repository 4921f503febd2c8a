"""Weights to numbers: bits per byte, benchmarks, the report."""
