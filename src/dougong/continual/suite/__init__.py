"""What a version must still do, as data, and the gate that asks it before release."""
