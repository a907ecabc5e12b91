"""vLLM's workers, with edits: `worker_cls` of a server that steers.

The model gets its programs after it was loaded, and before vLLM profiles, compiles or captures
anything, and the model runner is made to tell what it does (`runner`).
"""

from __future__ import annotations

import os
from typing import Any

from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank
from vllm.platforms import current_platform

from server.engine.vllm.hooks import decoder_layers
from server.engine.vllm.layout import CONFIG_KEY, Layout
from server.engine.vllm.lifeline import end_with
from server.engine.vllm.reports import Sender
from server.engine.vllm.runner import steer
from server.engine.vllm.steerer import Steerer

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class SteeringWorker(PlatformWorker):  # type: ignore[misc]
    """A worker of this platform whose model applies edits."""

    steerer: Steerer

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        runner, config = self.model_runner, self.vllm_config
        model = runner.get_model()
        blocks = decoder_layers(model)
        inner = next(module for module in model.modules() if getattr(module, "layers", 0) is blocks)
        first, end = getattr(inner, "start_layer", 0), getattr(inner, "end_layer", len(blocks))
        captured = config.compilation_config.max_cudagraph_capture_size or 0
        self.steerer = Steerer(
            Layout.from_json(config.additional_config[CONFIG_KEY]),
            {i: blocks[i] for i in range(first, end)},
            tokens=max(runner.max_num_tokens, captured),
            dtype=self.model_config.dtype,
            device=self.device,
            reports=get_tensor_model_parallel_rank() == 0,
            eager=self.model_config.enforce_eager,
        )
        steer(runner, self.steerer, last_stage=get_pp_group().is_last_rank)

    # Called by the server, through vLLM's `collective_rpc`.

    def steering_connect(self, address: str, word: str) -> None:
        """Send reports there."""
        self.steerer.send = Sender(address, word)

    def steering_end_with(self, server: int, processes: list[int]) -> int:
        """Returns this process's id."""
        end_with(server, processes)
        return os.getpid()

    def steering_put_probes(self, data: bytes) -> None:
        self.steerer.put_probes(data)

    def steering_put_edits(self, data: bytes, drop: list[int]) -> str:
        """Returns why the edits cannot be applied, or nothing."""
        try:
            self.steerer.put_edits(data, drop)
        except ValueError as error:
            return str(error)
        return ""
