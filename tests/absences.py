"""Which records of a batch lack what, for tests of whether many ranks step as one process does."""

BATCH = 8
ABSENCES = {
    "everything everywhere": "bbbbbbbb",
    "one rank lacks the picture": "rrrrbbbb",
    "no rank has a picture": "rrrrrrrr",
    "no rank has either": "--------",
    "each rank has another one": "pppprrrr",
    "mixed": "pr-b-brp",
}
"""A letter for each record of a batch: p (its pictures alone), r (its remarks alone), b (both) or - (neither)."""
