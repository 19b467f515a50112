"""The product index on disk or in a database."""
