"""ResNet, title encoder, product localisation and the three SICoT streams."""
