"""Plots: the figures of the notebooks, in one style."""
