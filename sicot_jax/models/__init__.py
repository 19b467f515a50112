"""ResNet, word attention and the three streams."""
