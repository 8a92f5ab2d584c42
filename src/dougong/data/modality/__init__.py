"""One file per kind of modality: its settings, how a cell is decoded, how decoded media become one batch."""
