"""Runs plans: the Store, devices, memory, threads, checkpoints."""
