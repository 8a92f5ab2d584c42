"""What every area shares: errors, settings, seeds, events and files. Loads no torch."""
