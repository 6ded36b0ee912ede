"""GraphedStep: passes captured in CUDA graphs, one for each bucket of sizes that batches fall into."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.models.masking import MaskSource, Plan


class CudaGraphs:
    """Captures on one GPU. Its graphs share their memory, so they must run one after the other.

    Args:
        device: the GPU. ValueError: it is not a GPU.
    """

    def __init__(self, device: torch.device):
        if device.type != "cuda":
            raise ValueError(f"device must be a GPU to capture CUDA graphs (cuda_graphs), got {device}")
        self.device, self.pool = device, torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """function(), on a stream of its own, as torch asks for it before a capture: kernels are compiled."""
        with torch.cuda.device(self.device):
            before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
            stream.wait_stream(before)
            with torch.cuda.stream(stream):
                outputs = function()
            before.wait_stream(stream)
        return outputs

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """(what launches all kernels of function(), its result, which is written anew by each launch). Nothing runs."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: a loader's thread may pin memory meanwhile
        with torch.cuda.device(self.device), torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):
            outputs = function()
        return graph.replay, outputs


@dataclasses.dataclass
class _Captured:
    """What the passes of a bucket read and leave, always in the same memory."""

    batch: ImageTextBatch
    plan: Plan
    replay: Callable[[], None] | None = None  # None: not captured yet
    outputs: Any = None


class GraphedStep:
    """Forward and backward pass over ragged batches, launched as one CUDA graph:

        def passes(batch, plan):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(batch, plan=plan).loss
            loss.backward()
            return loss.detach()

        step = GraphedStep(passes, model)
        for number, batch in loader:
            loss = step(batch, model.plan(batch, seed=0, step=number, bucket=True))
            optimizer.step()
            optimizer.zero_grad()

    A graph has its sizes built in, so there is one for each `Plan.bucket`: the first pass of a bucket runs as it is,
    the second is captured, and from then on a pass is four copies and one launch. Gradients are added up in memory of
    their own, zeroed where an optimizer has let go of them.

    Args:
        passes: passes(batch, plan) -> tensors on the device, a structure of them or None. It is called twice for each
            bucket: what it does beside launching kernels (printing, a learning rate of the host's) is not repeated. It
            must not wait for the device, and has autocast within.
        model: a model whose plans have buckets (`Model.BUCKETS`), on a GPU; not wrapped in DDP or FSDP.

    Raises:
        ValueError: the model is not on a GPU.
    """

    def __init__(self, passes: Callable[[ImageTextBatch, Plan], Any], model: nn.Module):
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.passes, self.device, self.grid = passes, parameters[0].device, model.config.grid
        self.graphs = CudaGraphs(self.device)
        self.captured: dict[tuple, _Captured] = {}
        self.gradients = {parameter: torch.zeros_like(parameter) for parameter in parameters}

    def __call__(self, batch: ImageTextBatch, plan: Plan) -> Any:
        """What `passes` makes of them, in memory that the next call may overwrite; `.grad` is added to.

        Args:
            batch: on any device. plan: made of it with bucket=True, on any device.

        Raises:
            ValueError: a plan of another batch, or images of mixed sizes.
        """
        plan.check(batch, self.grid, MaskSource())  # a replay would not find it
        key = plan.bucket, batch.text.dtype, None if batch.images is None else batch.images.dtype
        found = self.captured.get(key)
        first = found is None
        if first:
            roomy = batch.with_room(plan.images, plan.words)
            self.captured[key] = found = _Captured(roomy.to(self.device), plan.clone_to(self.device))
        else:
            found.batch.copy_(batch)
            found.plan.copy_(plan)
        self._attach_gradients()
        passes = lambda: self.passes(found.batch, found.plan)  # noqa: E731
        if first:
            return self.graphs.warm_up(passes)
        if found.replay is None:
            found.replay, found.outputs = self.graphs.capture(passes)
        found.replay()
        return found.outputs

    def _attach_gradients(self) -> None:
        """`.grad` to where the graphs add theirs, with what is there already."""
        gone = [gradient for parameter, gradient in self.gradients.items() if parameter.grad is None]
        if gone:
            torch._foreach_zero_(gone)
        for parameter, gradient in self.gradients.items():
            if parameter.grad is not None and parameter.grad is not gradient:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient
