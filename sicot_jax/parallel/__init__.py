"""The device mesh, runs of several processes, and the synchronisation of gradients."""
