"""Settings of measuring features."""

from __future__ import annotations

from dataclasses import dataclass

from glp_lens.settings import Settings, option


@dataclass(frozen=True, kw_only=True)
class FeatureSettings(Settings):
    """What is measured of features, and how much of it is kept."""

    panel = "Features"

    tokens: int = option(1_000_000, min=0, panel="Data")
    """Tokens to measure features on; 0 takes all."""
    sigma: float = option(0.1, min=0, max=1)
    """Noise level of a GLP's meta-neurons."""
    top: int = option(20, min=1, max=1000, memory=True)
    """Passages of the highest values that are kept of each feature, and of the lowest, one of each text."""
    per_band: int = option(5, min=1, max=1000, memory=True)
    """Random passages that are kept of each fifth of a feature's range."""
    window: int = option(20, min=1, max=1000, memory=True)
    """Tokens of a passage, two thirds of them before the one shown."""
    sample: int = option(16_384, min=2, memory=True)
    """Random tokens whose activations are kept, for histograms and correlations."""
