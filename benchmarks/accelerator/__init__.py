"""A speed recipe on a GPU or TPU: its time, and where the time goes."""
