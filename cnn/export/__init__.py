"""A trained model as files that other programs read: StableHLO, ONNX, safetensors, a model card.

Each module makes the bytes of one file and writes nothing; `cnn.commands.export` writes them.
"""
