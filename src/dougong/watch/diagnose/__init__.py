"""Names what is wrong with a training: the fault, its place, its evidence, and what would mend it."""
