"""Jobs that build, change, check and evaluate a product index."""
