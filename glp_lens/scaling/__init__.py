"""Scaling: many priors and baselines of different size and budget, and what each unit of compute buys."""
