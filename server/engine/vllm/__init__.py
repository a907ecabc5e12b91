"""The vLLM engine: the same profiles on stock vLLM, compiled, over several devices.

vLLM is imported by `worker`, `hooks`' callers and `engine` when they start it, and by nothing else.
"""
