"""Benchmarks of whole training steps: loops side by side, and ways to run sub-networks together that do not pay."""
