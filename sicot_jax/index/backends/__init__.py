"""Implementations of ProductIndex: local files, shards, PostgreSQL, Milvus."""
