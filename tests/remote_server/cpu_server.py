"""What lets an NDIF server run on a CPU, with its own keys, and be slow on request.

This runs in the server's environment, beside ndif, not in that of the tests. Everything else of the
server is as it is installed: API, queue, dispatcher, controller, actors.
"""

import gc
import json
import os
import time
from pathlib import Path

import ray
import torch
from ndif.services.ray.deployments.controller.controller import _ControllerActor
from ndif.services.ray.deployments.modeling.base import BaseModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel
from nnsight.modeling.mixins.remotable import CheckpointInfo, Remotable
from transformers import AutoConfig

STATE = Path(os.environ["PROBE_NDIF_STATE"])


class _OnCpu(BaseModelDeployment):
    """The stock actor, less what needs a GPU."""

    CACHEABLE = False

    def __init__(self, *args, gpu_mem_bytes_by_id=None, **kwargs):
        super().__init__(*args, gpu_mem_bytes_by_id={}, **kwargs)

    def load_from_disk(self):
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **self.kwargs
        )
        model._module.requires_grad_(False)
        return model

    def execute(self, request):
        """Run a job, after as many seconds as the file `slow` says."""
        slow = STATE / "slow"
        end = time.monotonic() + (float(slow.read_text()) if slow.exists() else 0)
        while time.monotonic() < end:
            time.sleep(0.05)
        # As a server with a GPU does for models of 16 bits; a job has to keep it off itself.
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            return super().execute(request)

    def cleanup(self):
        self.kill_switch.clear()
        self.kill_reason = self.execution_ident = None
        self.model.interleaver.cancel()
        gc.collect()


@ray.remote(num_cpus=0, max_restarts=-1)
class CpuModel(_OnCpu):
    """The actor of one model."""


def _describe(model_key, dtype, trust_remote_code=False):
    """A checkpoint by its config alone; the size is a token one, as memory is not what is tested.

    ndif 0.1.2 passes `trust_remote_code`, which nnsight 0.8.1 does not take.
    """
    config = AutoConfig.from_pretrained(json.loads(model_key.split(":", 1)[1])["repo_id"])
    return CheckpointInfo(size_bytes=2**20, n_params=2**18, config=config)


class _Controller(_ControllerActor):
    # The change is made here, since this is what runs in the controller's own process.
    def __init__(self, *args, **kwargs):
        Remotable.describe_checkpoint = staticmethod(_describe)
        Remotable.max_tp_size = staticmethod(lambda *args, **kwargs: None)
        super().__init__(*args, **kwargs)


@ray.remote(num_cpus=0, num_gpus=0, max_restarts=-1, resources={"head": 1})
class Controller(_Controller):
    """Places models."""
