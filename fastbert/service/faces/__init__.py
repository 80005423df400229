"""The faces of the service: each speaks as the clients of one kind expect."""
