"""Records and where they come from. Loads no tensor library."""
