"""The vLLM engine: the same profiles on stock vLLM, compiled, over several devices.

In the server's process: `engine` (what the server sees), `arrivals` (requests and their clients),
`replies` and `scores` (one request, and what its readings mean), `client` (vLLM itself),
`selftest`; `release` and `options` (which vLLM, started how), `layout` and `columns` (where edits
go). On the way: `wire`, `reports`, `readings`. In vLLM's workers: `worker`, `runner` (what vLLM is
about to do), `steerer` (fills buffers, reads them), `recipes`, `hooks` and `program` (what the
model computes).

`client`, `engine`, `sampling` and `worker` import vLLM, `replies` and `selftest` through them; the
rest is tested without it.
"""
