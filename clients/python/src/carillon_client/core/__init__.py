"""The pure core: what to send, when to try again, what frames mean. No sockets, no clock, no tasks.

Every machine is driven by hand: the caller passes the time (seconds, monotonic) and carries out what is
asked. The shells beside this package do that with httpx and websockets; tests do it with lists.
"""
