"""The Ray-free core of Carillon: pure state machines, the wire protocol, settings and ports."""

__version__ = "0.1.0"
