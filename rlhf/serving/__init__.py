"""A finished model that answers people and programs: behind vLLM's OpenAI-compatible API, and in a
terminal.
"""
