"""How results are shown: labels and number formats, tables, plots, and comparisons in words. What all pages share."""
