"""Import and export of stores: released GLP memmaps, SAELens's cached activations, plain arrays."""

from glp_lens.activations.convert.arrays import export_arrays, import_arrays
from glp_lens.activations.convert.memmaps import (
    export_memmap_layers,
    export_memmaps,
    import_memmap_layers,
    import_memmaps,
)
from glp_lens.activations.convert.sae_lens import export_sae_lens, import_sae_lens

__all__ = [
    "export_arrays",
    "export_memmap_layers",
    "export_memmaps",
    "export_sae_lens",
    "import_arrays",
    "import_memmap_layers",
    "import_memmaps",
    "import_sae_lens",
]
