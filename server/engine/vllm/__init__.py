"""The vLLM engine: the same profiles on stock vLLM, compiled, over several devices.

In the server's process: `engine` (what the server sees), `replies` and `reads` (one request and its
scores), `client` (vLLM itself), `selftest`; `options`, `layout` and `columns` (where edits go). On
the way: `wire`, `scores`, `readings`. In vLLM's workers: `worker`, `runner` (what vLLM is about to
do), `steerer` (fills buffers, reads them), `recipes`, `hooks` and `program` (what the model
computes).

vLLM itself is imported by `engine`, `replies`, `selftest`, `client`, `sampling` and `worker` alone.
"""
