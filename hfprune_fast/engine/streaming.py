"""A model whose weights do not fit: each layer's weights are fetched before the layer runs.

`weights.py` fetches them. On a CPU the last bits of a product can depend on where in a cache
line its weight begins, so a weight keeps its offset from the file wherever it is put; a weight that
had to be copied because of its dtype or alignment begins at the start of a line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hfprune_fast.checkpoint.loading import Blueprint, build, dtype_of_run, frozen, put
from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.engine.layerwise import (
    Head,
    OnProgress,
    ResidentModel,
    check_finite,
    no_progress,
)
from hfprune_fast.engine.weights import (
    ALIGN_BYTES,
    BufferedWeights,
    CheckpointTensors,
    MappedWeights,
)


def open_model(
    subject: Blueprint | ResidentModel,
    offload: str,
    *,
    streams_on_device: bool = False,
    backend: str | None = None,
) -> ResidentModel:
    """Return a blueprint's model, resident ("none") or streamed; return a loaded one as it is."""
    if isinstance(subject, ResidentModel):
        model = subject
    else:
        model = (
            ResidentModel(build(subject)) if offload == "none" else StreamedModel(subject, offload)
        )
    model.streams_on_device, model.backend = streams_on_device, backend
    return model


class StreamedModel(ResidentModel):
    """The model of a blueprint, with one or two layers in memory at a time.

    Args:
        offload: "disk" reads a layer's weights from the checkpoint each time; "cpu" keeps all of
            them in host memory, pinned if the device is a GPU, which reads them faster.

    Embeddings are looked up in the file. Errors are those of `ResidentModel`; a weight with NaN or
    inf is found when it is first fetched.
    """

    def __init__(self, blueprint: Blueprint, offload: str) -> None:
        super().__init__(blueprint.model)
        self.device, self.dtype = blueprint.device, blueprint.dtype
        for module in self.model.modules():  # rotary tables and others that are in no file
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)
        names, family = blueprint.names, self.parts.family
        decoder = f"{family.decoder}."
        prefixes: list[tuple[str, ...]] = [
            (f"{decoder}{family.layers}.{layer}.",) for layer in range(len(self.parts.layers))
        ]
        prefixes.append((f"{decoder}{family.norm}.", f"{family.head}."))
        # Of each unit: {name of a parameter or buffer: names of its tensors in the checkpoint}.
        self._names = [
            {
                ours: theirs
                for ours, theirs in names.items()
                if ours.startswith(prefix)
                and dtype_of_run(self.model, ours, self.dtype) == self.dtype
            }
            for prefix in prefixes
        ]
        (self._embedding,) = names[f"{decoder}{family.embedding}.weight"]
        vars(self.parts.embedding)["padding_idx"] = None  # the table that is read has few rows
        self._placeholders = self.model.state_dict(keep_vars=True)
        self._checked: set[str] = set()
        self._tensors = CheckpointTensors(blueprint.source, self.dtype)
        units = [sorted(set(unit.values())) for unit in self._names]
        covered = {f"{decoder}{family.embedding}.weight"}.union(*self._names)
        for ours in names.keys() - covered:  # in no unit, so these stay
            dtype = dtype_of_run(self.model, ours, self.dtype)
            tensor = CheckpointTensors(blueprint.source, dtype).tensor(names[ours])
            self._check_once(names[ours][0], tensor)
            put(self.model, ours, frozen(tensor.to(self.device)))
        self._weights: MappedWeights | BufferedWeights
        if offload == "disk" and self.device.type == "cpu":
            self._weights = MappedWeights(self._tensors, units)
        else:
            self._weights = BufferedWeights(self._tensors, units, self.device, offload == "cpu")

    def _check(self) -> None:
        """Do nothing: weights are checked when they are first fetched."""

    def __exit__(self, *error: object) -> None:
        self._weights.close()
        super().__exit__(*error)

    def embed(self, ids: Tensor) -> Tensor:
        # Only a few rows of the table are read.
        table = self._tensors.stored(self._embedding, read_ahead=False)
        self._check_once(self._embedding, table)
        used, rows = ids.unique(return_inverse=True)
        weight = {"weight": table[used].to(self.dtype)}
        self._tensors.release((self._embedding,))
        module = self.parts.embedding
        buffers = {name: buffer.to("cpu") for name, buffer in module.named_buffers()}
        embeddings: Tensor = torch.func.functional_call(module, weight | buffers, (rows,))
        return embeddings.to(self.device)

    @contextmanager
    def weights_of(self, unit: int, then: int) -> Iterator[None]:
        tensors = self._weights.fetch(unit, then)
        names = self._names[unit]
        placeholders = {ours: self._placeholders[ours] for ours in names}
        try:
            for ours, theirs in names.items():
                tensor = tensors[theirs]
                for name, part in zip(theirs, tensor if len(theirs) > 1 else [tensor], strict=True):
                    self._check_once(name, part)
                put(self.model, ours, frozen(tensor.view(placeholders[ours].shape)))
            yield
        finally:
            for ours, placeholder in placeholders.items():
                put(self.model, ours, placeholder)
            del tensors
            self._weights.release(unit)

    def head(self) -> Head:
        with self.weights_of(self.head_unit, then=0):
            head = super().head()
            if isinstance(self._weights, MappedWeights):
                return head
            bias = None if head.bias is None else head.bias.clone()
            return Head(_copy_with_alignment(head.weight), bias, head.logits)

    def final_hidden(
        self, batches: Sequence[MicroBatch], on_progress: OnProgress = no_progress
    ) -> Iterator[Tensor]:
        """Yield as `ResidentModel.final_hidden` does, after all micro-batches are computed."""
        yield from self._final_hidden(batches, on_progress)

    def _offload(self, hidden: Tensor) -> Tensor:
        return hidden.cpu()

    def _check_once(self, name: str, tensor: Tensor) -> None:
        if name not in self._checked:
            check_finite(name, tensor)
            self._checked.add(name)


def _copy_with_alignment(tensor: Tensor) -> Tensor:
    """Return a copy that begins at the same offset into a cache line."""
    offset = tensor.data_ptr() % ALIGN_BYTES // tensor.itemsize
    buffer = tensor.new_empty(offset + tensor.numel())
    return buffer[offset:].view_as(tensor).copy_(tensor)
