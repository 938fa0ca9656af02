"""The control plane's servers: identity, destination with policy. Thin: `core` decides, these ask, answer and count.

`app.py` wires both programs, top to bottom.
"""
