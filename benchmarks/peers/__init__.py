"""Training and inference beside textbook Flax, PyTorch and Keras."""
