"""What a layout will cost, before any device is asked."""
