"""Compare the cache of a server that is already running, over HTTP.

The modules `llama_cpp`, `vllm`, `sglang` and `openai` know how to ask one kind of server; nothing else does.
"""
