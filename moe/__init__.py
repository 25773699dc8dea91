"""Mixture of experts: routing, dispatch and the grouped products."""
