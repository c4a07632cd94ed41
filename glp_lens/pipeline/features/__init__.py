"""Jobs on features: measure them, show them, take them elsewhere, explain them."""
