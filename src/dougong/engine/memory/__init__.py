"""What a step keeps in memory, and what it makes anew, moves or rounds instead."""
