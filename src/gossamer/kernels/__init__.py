"""Kernels: how a format runs. `reference` is the oracle of every other one and the last resort on any device."""
