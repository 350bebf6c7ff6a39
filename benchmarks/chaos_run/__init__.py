"""Chaos: a fleet under load, random faults from a seed, and accounts of every request, exit and leftover."""
