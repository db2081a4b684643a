"""Joint training on labelled stills."""
