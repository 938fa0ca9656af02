"""emojivoto, the demo application: web (HTTP), emoji and voting (gRPC) and a bot that votes.

It knows nothing of Mantle: it is what an application looks like that is put into a mesh unchanged.
"""
