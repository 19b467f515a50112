"""The recognition service: photos in over HTTP, products out."""
