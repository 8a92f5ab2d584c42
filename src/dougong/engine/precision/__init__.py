"""In which number format what is computed, and what keeps 16 bits from losing anything."""
