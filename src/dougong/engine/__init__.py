"""How a model is trained and judged: one step, the loop around it, precision, checkpoints, evaluation."""
