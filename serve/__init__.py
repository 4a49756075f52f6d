"""The Ray Serve ingress: one ASGI app behind two doors."""
