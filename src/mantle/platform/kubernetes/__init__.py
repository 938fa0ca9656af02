"""The platform port on a Kubernetes cluster: the API server's objects as the mesh sees them, and its word on tokens."""
