"""What a model is made of: encoders, bridge, gate, heads, and the sandwich that joins them."""
