"""One training loop for every network of the demo: AdamW, cosine rate, EMA, a time budget, CUDA graphs.

The networks are so small that launching kernels takes longer than running them. The whole step (drawing the
batch included) is therefore captured once as a CUDA graph and replayed; on a CPU it runs as written.
"""

import math
import time
from collections.abc import Callable, Iterable

import torch

WARMUP_STEPS = 300
EMA_EVERY = 10


class Loop:
    """Minimises `loss_fn()` over the parameters of `modules`."""

    def __init__(
        self,
        loss_fn: Callable[[], torch.Tensor],
        modules: Iterable,
        rate: float,
        ema: float = 0.999,
        graph: bool = True,
    ):
        self.loss_fn = loss_fn
        self.params = [p for module in modules for p in module.parameters() if p.requires_grad]
        self.device = self.params[0].device
        self.cuda = self.device.type == "cuda"
        self.graph = graph and self.cuda
        self.rate = rate
        self.ema_decay = ema
        self.averages = [p.detach().clone() for p in self.params]
        self.rate_now = torch.tensor(rate, device=self.device)
        self.optimizer = torch.optim.AdamW(
            self.params, lr=self.rate_now, betas=(0.9, 0.99), weight_decay=0.01, capturable=self.cuda
        )
        self.step = 0

    def _eager_step(self) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_fn()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        return loss.detach()

    def _capture(self) -> Callable[[], torch.Tensor]:
        """Warm up on a side stream, as CUDA graphs ask for, then record one step."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(5):
                self._eager_step()
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self._eager_step()

        def replay() -> torch.Tensor:
            graph.replay()
            return loss

        return replay

    def _average(self) -> None:
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step)) ** EMA_EVERY
        torch._foreach_lerp_(self.averages, self.params, 1.0 - decay)

    def run(self, seconds: float, watch: Callable | None = None, watch_every: int = 1000, floor: float = 0.02):
        """Train for `seconds`; the rate falls by a cosine of the time spent to `floor` of its height."""
        self.rate_now.fill_(self.rate / WARMUP_STEPS)
        take_step = self._capture() if self.graph else self._eager_step
        start, first = time.monotonic(), self.step
        mean = torch.zeros((), device=self.device)
        while (spent := time.monotonic() - start) < seconds:
            share = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * spent / seconds))
            warm = min(1.0, (self.step - first + 1) / WARMUP_STEPS)
            self.rate_now.fill_(self.rate * share * warm)
            mean.lerp_(take_step(), 0.01)
            self.step += 1
            if self.step % EMA_EVERY == 0:
                self._average()
            if self.step % 100 == 0 and self.cuda:
                torch.cuda.synchronize()  # or the queue runs ahead of the clock
            if self.step % watch_every == 0:
                note = watch(self) if watch else ""
                print(f"step {self.step:6d} {spent:6.1f} s loss {mean.item():.4f} {note}", flush=True)
        print(f"{self.step - first} steps, {1000 * seconds / max(1, self.step - first):.2f} ms each", flush=True)

    def swap(self) -> None:
        """Exchange the weights with their running averages; calling it twice restores them."""
        for param, average in zip(self.params, self.averages, strict=True):
            kept = param.detach().clone()
            param.data.copy_(average)
            average.copy_(kept)
