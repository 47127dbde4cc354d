"""How a run will go, and an estimate of its peak memory."""

from __future__ import annotations

from dataclasses import dataclass

from hfprune_fast.console import human_bytes


@dataclass(frozen=True)
class Plan:
    """How scoring will run, and an estimate of its peak memory."""

    offload: str  # "none" (resident), "cpu" or "disk"
    recompute: bool
    batch_size: int
    pass_tokens: int  # of a streamed pass; 0 where every micro-batch is a pass
    inputs_on_host: bool
    logits_budget_bytes: int | None
    weights_bytes: int
    activations_bytes: int  # with the logits and, if they are on the device, the layers' inputs
    tables_bytes: int
    refit_bytes: int  # of removal costs and refit, one after the other, when scoring is through
    free_bytes: int
    streams_on_device: bool = False  # and the covariances: what else is kept in host memory

    @property
    def total_bytes(self) -> int:
        passing = max(self.activations_bytes, self.refit_bytes)
        return self.weights_bytes + passing + self.tables_bytes

    def __str__(self) -> str:
        where = {
            "none": "weights resident",
            "cpu": "weights streamed from host memory",
            "disk": "weights streamed from the checkpoint",
        }[self.offload]
        a_pass = f", passes of {self.pass_tokens} tokens" if self.pass_tokens else ""
        return (
            f"{where}, layers {'recomputed' if self.recompute else 'stored'}, "
            f"{self.batch_size} sequence{'s'[: self.batch_size != 1]} at once{a_pass}; about "
            f"{human_bytes(self.total_bytes)} of {human_bytes(self.free_bytes)}: "
            f"weights {human_bytes(self.weights_bytes)}, "
            f"tables {human_bytes(self.tables_bytes)}, "
            f"activations {human_bytes(self.activations_bytes)}"
            + (f", later {human_bytes(self.refit_bytes)} to refit" if self.refit_bytes else "")
        )
