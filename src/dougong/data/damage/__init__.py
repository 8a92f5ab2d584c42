"""The formulas by which media are spoilt on purpose, one file per kind of medium."""
