"""The HTTP gateway: LoRAX's REST routes and the OpenAI API in front of one or more Triton servers.

An ASGI application. It talks to Triton through the client package `lorax_triton` and holds nothing of the engine.
"""
