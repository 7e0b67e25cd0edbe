"""The devices that a plan is counted for: how much they hold, and how fast they are at work.

Peaks are those of the makers' data sheets, without sparsity. Llama 3 was trained at 38 to 43 % of the H100's (arXiv
2407.21783, table 4); small batches and LoRA's thin products reach less, 30 % are counted. Of the bandwidth, decoding reaches
some 70 %. Where passes are short, neither counts, but how fast the host launches kernels: a dense Llama-2-7B of 32 blocks decodes
39.48 tokens/s on an A100 in the paper's Table 4, 0.8 ms a block, where its weights would take 0.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from buddy.errors import unknown

REACHED, READ = 0.3, 0.7
"""Shares of the peak, and of the bandwidth."""
LAUNCH_S = 8e-4
"""A call of a block on a GPU takes at least so long."""


@dataclass(frozen=True)
class Device:
    """A device.

    Attributes:
        name: on the command line.
        memory_gb: what it holds.
        flops: per second, of matrix products, sustained.
        bytes_s: of weights and cache read per second, sustained.
        launch_s: a call of a block takes at least so long.
        weight_bytes: of a weight as it computes.
        words: those in the name that drivers give it.
        source: of the figures.
    """

    name: str
    memory_gb: float
    flops: float
    bytes_s: float
    launch_s: float
    weight_bytes: int
    words: tuple[str, ...]
    source: str

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.name != "cpu"


def _gpu(name: str, memory_gb: float, tflops: float, gb_s: float, *words: str, source: str) -> Device:
    return Device(name, memory_gb, 1e12 * tflops * REACHED, 1e9 * gb_s * READ, LAUNCH_S, 2, words, source)


DEVICES = {
    one.name: one
    for one in (
        _gpu("h200", 141, 989.4, 4800, "H200", source="NVIDIA H200 data sheet, SXM"),
        _gpu("h100", 80, 989.4, 3350, "H100", source="NVIDIA H100 data sheet, SXM"),
        _gpu("a100", 80, 312, 2039, "A100", "80GB", source="NVIDIA A100 data sheet, SXM 80 GB"),
        _gpu("a100-40gb", 40, 312, 1555, "A100", "40GB", source="NVIDIA A100 data sheet, SXM 40 GB"),
        _gpu("l40s", 48, 362, 864, "L40S", source="NVIDIA L40S data sheet"),
        _gpu("rtx4090", 24, 165.2, 1008, "4090", source="NVIDIA Ada whitepaper, FP16 with FP32 sums"),
        # 475 tokens/s of a prompt, 22 decoded, of SmolLM2-135M in float32.
        Device("cpu", 8, 1.2e11, 1.2e10, 0.0, 4, ("cpu",), "two cores of an AMD EPYC: results/reference/epyc-2-cores"),
    )
}
"""By name; memory of ``cpu`` is a small machine's."""


def device(name: str) -> Device:
    """A device by name.

    Raises:
        UserError: there is none of that name; says which there are.
    """
    if name not in DEVICES:
        raise unknown("device", name, DEVICES)
    return DEVICES[name]


def named(text: str) -> Device | None:
    """The device that a record names, as ``NVIDIA H100 80GB HBM3``; None for one that is not in the table."""
    return next((one for one in DEVICES.values() if all(word in text for word in one.words)), None)
