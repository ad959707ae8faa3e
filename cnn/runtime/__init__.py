"""What a run needs of the machine: devices, files, signals, the screen.

A researcher need not read it: `cnn.training` puts these parts together.
"""
