"""One encoder per kind of modality: media to tokens."""
