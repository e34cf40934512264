"""The APIs that clients speak: requests parsed once into a typed request, answers rendered back. Knows no sockets."""
