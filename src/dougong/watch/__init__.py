"""Listeners that show what a run announces: TensorBoard files, a progress bar, reports."""
