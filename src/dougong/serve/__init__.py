"""Answers over a network: batches that fit the load, workers that hold the model, and the protocols."""
