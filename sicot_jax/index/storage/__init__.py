"""Files of an index version: products, vectors, binary codes, inverted lists."""
