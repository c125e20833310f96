"""Figures of runs and of what a model does."""
