"""Benchmarks: each starts a broker of its own and load generators in processes of their own."""
