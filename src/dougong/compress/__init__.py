"""A bundle made smaller and faster: distilled, pruned, quantised, to a budget."""
