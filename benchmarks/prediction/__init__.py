"""Classifying a folder of photographs, beside Keras and timm."""
