"""A bundle made smaller and faster: distilled, pruned, rounded and exported, to a budget."""
