"""What flows through a network in training, measured while somebody else trains."""
