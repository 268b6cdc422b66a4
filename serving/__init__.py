"""A server of OpenAI's completions interface: many clients, one running batch.

`app` speaks HTTP on an event loop; `engine` is the one thread that owns the model. Requests go from the one to
the other through a bounded queue, and news of them come back.
"""
