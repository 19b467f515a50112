"""The product index: cards, features and codes of every photo, beside the recogniser that made them."""
