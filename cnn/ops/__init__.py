"""Operators: how a convolution, a pooling or a microbatch is computed on each backend.

Pure functions of arrays. A researcher need not enter: models call `cnn.ops.convolution`.
"""
