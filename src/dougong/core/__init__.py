"""What every area shares: errors, settings, seeds, events, signatures and the bundle format. Loads no torch."""
