"""What carries an exported model out, each behind the same small interface."""
