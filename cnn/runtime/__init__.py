"""What a run needs of the machine: devices, files, signals, the screen.

A researcher need not enter: `cnn.training` puts these parts together.
"""
