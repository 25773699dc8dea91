"""Kernels, each with a reference in plain JAX that it must agree with."""
