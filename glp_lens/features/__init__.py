"""Looking at features: what each one is active on, what it writes, and which others are like it."""

from typing import TYPE_CHECKING

from glp_lens.lazy import exports

if TYPE_CHECKING:
    from glp_lens.features.folder import BANDS, TABLES, About, FeatureFolder, ModelAbout, Way, name_of, parse_name

__all__ = ["BANDS", "TABLES", "About", "FeatureFolder", "ModelAbout", "Way", "name_of", "parse_name"]

__getattr__, __dir__ = exports(__name__, {"folder": __all__})
