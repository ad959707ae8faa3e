"""How the cost of a training step grows."""
