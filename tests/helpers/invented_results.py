"""Result files of machines that do not exist, with every operation, provider and kind of row."""

from typing import Any

from records import Result, Row, row

MODELS = {
    "Llama-2-7B": (4096, 11008, 32000), "Llama-3.1-8B": (4096, 14336, 128256),
    "Qwen2.5-7B": (3584, 18944, 152064), "Qwen3-0.6B": (1024, 3072, 151936),
}  # fmt: skip
# How many times the floor's time each takes, and how many times the input its memory is.
COST = {
    "ours, torch": (1.6, 0.4), "ours, triton": (1.05, 0.02), "HFPrune's arithmetic": (9.0, 7.5),
    "eager": (5.1, 4.0), "torch.compile": (2.2, 2.0), "Liger": (1.7, 0.9),
    "Cut Cross Entropy": (1.9, 0.1), "torch linear_cross_entropy": (2.4, 0.8),
    "ours, in place": (1.1, 0.0), "ours, out=": (1.06, 1.0),
    "index_select": (5.2, 1.0), "numpy.take, out=": (1.6, 1.0), "ours": (1.7, 0.5),
    "ours, offload=none": (1.7, 0.5), "ours, offload=disk": (2.4, 0.2), "cp": (1.0, 0.0),
}  # fmt: skip
CROSS_ENTROPY = ("Liger", "Cut Cross Entropy", "torch linear_cross_entropy")
ENTROPY = ("ours, torch", "ours, triton", "HFPrune's arithmetic", "eager", "torch.compile")
COMPACT = ("ours, in place", "ours, out=", "index_select", "numpy.take, out=")
WIDTH = {"bfloat16": 2, "float32": 4}


def invented(device: str = "cpu", date: str = "2030-01-02") -> Result:
    """A machine's result: a CPU's, on which two peers are skipped, or a GPU's."""
    gpu = device == "cuda"
    copy, product = (3000.0, 700_000.0) if gpu else (20.0, 150.0)
    machine: dict[str, Any] = {
        "name": "inventa-9-2core", "device": device, "processor": "Inventa 9", "cores": 2,
        "memory_bytes": 16_000_000_000,
    }  # fmt: skip
    if gpu:
        machine = {
            "name": "inventa-g1", "device": device, "processor": "Inventa G1",
            "memory_bytes": 80_000_000_000, "driver": "999.1",
        }  # fmt: skip
    make = _Rows(copy, product, gpu)
    rows = [*make.kernels(), *make.scoring()]
    return {
        "machine": machine,
        "versions": {"python": "3.11.7", "torch": "2.13.0", "triton": "3.7.1"},
        "threads": 2,
        "date": f"{date}T15:00:00+00:00",
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "uncommitted_changes": False,
        "ceilings": [
            {"dtype": "bfloat16", "copy_gb_per_s": copy, "product_gflop_per_s": product},
            {"dtype": "float32", "copy_gb_per_s": copy, "product_gflop_per_s": product / 2},
        ],
        "rows": rows + ([] if gpu else make.compaction()),
    }  # fmt: skip


class _Rows:
    def __init__(self, copy: float, product: float, gpu: bool) -> None:
        self.copy, self.product, self.gpu = copy, product, gpu
        self.tokens = 8192 if gpu else 256

    def kernels(self) -> list[Row]:
        rows = []
        for model, (d, f, v) in MODELS.items():
            for dtype, width in WIDTH.items():
                t = self.tokens
                for op, sizes, moved in (
                    ("softmax_entropy", {"T": t, "V": v}, t * v * width),
                    ("softmax_entropy_grad", {"T": t, "V": v}, 2 * t * v * width),
                    ("gated_taylor", {"T": t, "F": f}, 5 * t * f * width),
                    ("taylor_statistics", {"T": t, "F": f}, 2 * t * f * width),
                ):
                    identity = {"op": op, "model": model, "dtype": dtype, "sizes": sizes}
                    rows += [self.one(identity, name, moved) for name in ENTROPY]
                rows += self.head({"model": model, "dtype": dtype}, t, d, v)
        return rows

    def head(self, identity: Row, t: int, d: int, v: int) -> list[Row]:
        identity = {"op": "linear_entropy", **identity, "sizes": {"T": t, "D": d, "V": v}}
        moved = WIDTH[identity["dtype"]] * (2 * t * d + v * d)
        names = (*ENTROPY, *CROSS_ENTROPY)
        return [self.one(identity, name, moved, 4 * t * d * v) for name in names]

    def scoring(self) -> list[Row]:
        rows, params = [], 250_000_000
        sizes = {"T": 1024, "D": 512, "L": 16, "V": 32000, "params": params}
        identity = {"op": "score", "model": "", "dtype": "bfloat16", "sizes": sizes}
        for name in ("ours", "HFPrune's arithmetic"):
            rows.append(self.one(identity, name, 2 * params, 4096 * params))
        sizes = {"T": 4096, "D": 2048, "L": 20, "V": 128256, "params": 2_470_000_000}
        identity = {"op": "score", "model": "", "dtype": "bfloat16", "sizes": sizes}
        for name, mapped in (
            ("ours, offload=none", 4_947_000_000),
            ("ours, offload=disk", 528_000_000),
        ):
            made = self.one(identity, name, 4_947_000_000, 16384 * 2_470_000_000)
            rows.append(made | {"mapped_bytes": mapped})
        sizes = {"T": 2048, "D": 128, "L": 4, "V": 2048, "params": 1_049_728}
        identity = {"op": "whole_job", "model": "demo", "dtype": "float32", "sizes": sizes}
        rows += [
            self.one(identity, name, 4_200_000, 10**12) | {"kept_overlap": 0.991}
            for name in ("ours", "HFPrune's arithmetic")
        ]
        return rows

    def compaction(self) -> list[Row]:
        identity = {"model": "Llama-3.1-8B", "dtype": "bfloat16", "sizes": {"D": 4096, "F": 14336}}
        rows = [
            self.one({"op": op, **identity}, name, 187_891_712, floor="memcpy")
            for op in ("compact_rows", "compact_columns")
            for name in COMPACT
        ]
        identity = {"op": "prune_checkpoint", "model": "", "dtype": "bfloat16", "sizes": {"L": 20}}
        return rows + [
            self.one(identity, name, 1_683_754_533, floor="cp") for name in ("ours", "cp")
        ]

    def one(self, identity: Row, name: str, moved: int, flops: int = 0, floor: str = "") -> Row:
        cross = name in CROSS_ENTROPY and identity["op"] == "linear_entropy"
        identity = identity | {
            "provider": name,
            "computes": "cross entropy" if cross else "entropy",
        }
        if not self.gpu and name in ("ours, triton", "Liger", "Cut Cross Entropy"):
            return {**identity, "skipped": "needs a GPU"}
        if identity["dtype"] == "float32" and name == "Cut Cross Entropy":
            return {**identity, "skipped": "its gradients are for bfloat16 and float16"}
        time, memory = COST[name]
        peak = int(memory * (flops / identity["sizes"].get("D", 512) if flops else moved))
        if self.gpu and peak > 35e9:
            return {**identity, "failed": "out of memory"}
        product = self.product / (WIDTH[identity["dtype"]] / 2)
        floor_ms = flops / product / 1e6 if flops else moved / self.copy / 1e6
        times_ms = [time * floor_ms * (1 + 0.01 * i) for i in range(-3, 4)]
        return row(
            identity, times_ms, [floor_ms] * 7,
            floor=floor or ("products" if flops else "copy"), bytes_moved=moved, flops=flops,
            peak_bytes=peak, error=0.0012, error_allowed=0.0031,
        )  # fmt: skip
