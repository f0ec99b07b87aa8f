"""Benchmarks: cases that know their minimal bytes, variants that compute them, and measurements of both."""
