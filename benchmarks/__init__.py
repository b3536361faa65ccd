"""Measurements. Each module is a command; what it wrote lies in docs/benchmarks."""
