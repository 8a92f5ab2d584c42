"""The command line: reads options, calls one function that a notebook could call, prints."""
