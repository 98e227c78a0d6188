"""A finished model in the forms that other programs read: GGUF files for llama.cpp, an Ollama
Modelfile, a model card. Every form is read again before it counts.

What a writer doesn't know for certain it refuses by name: a wrong file loads without an error, and
answers badly.
"""
