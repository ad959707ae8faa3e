"""Operators: how a convolution, a pooling or a microbatch is computed on each backend.

These are pure functions of arrays. To use them in a model, read `cnn.ops.convolution` only.
"""
