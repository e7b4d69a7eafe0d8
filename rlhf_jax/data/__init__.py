"""From data files to batches of fixed shape: sources, row formats, tokens, held-out rows, the loader."""
