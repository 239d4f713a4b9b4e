"""Load for a running server, and what it made of it: the client behind `jpaged bench serve`.

Works against any server with OpenAI's API, imports no JAX and nothing of the engine. Names,
defaults and definitions are those of `vllm bench serve`, so that results can be compared.
"""
