"""Benchmarks and quality reports; installed as ``rmcore.bench``."""
