"""Pictures of one's own: a folder of them, and classifying photographs beside Keras and timm."""
