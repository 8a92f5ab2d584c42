"""Using a trained model: from a bundle to predictions."""
