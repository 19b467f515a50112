"""Reports of finished runs; reads run folders and run tables, needs no JAX."""
